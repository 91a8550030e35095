# Writes what R finds of made-up scores and effects, as JSON: Rscript tests/analysis/r/regressions.R > tests/analysis/r/regressions.json
# The same data are made in tests/simulated_edits.py. Needs R with nlme.
library(nlme)

noise <- function(f, l, k) {
  v <- sin(12.9898 * f + 78.233 * l + 37.719 * k) * 43758.5453
  v - floor(v)
}

table_of <- function(facts, layers, flat) {
  d <- expand.grid(l = 0:(layers - 1), f = 0:(facts - 1))
  d$e <- noise(d$f, d$l, 1)
  if (flat) d$e[d$l == 2] <- 0.25
  own <- noise(d$f, 0, 3)
  d$s <- 0.12 * d$l + 0.2 * own + ifelse(d$l == 3, 0.25 * d$e, 0) + 0.3 * noise(d$f, d$l, 2)
  d[!(d$f %% 7 == 3 & d$l == 1), ]
}

number <- function(x) formatC(x, digits = 17, format = "g")
line <- function(name, x) sprintf('"%s": [%s]', name, paste(number(x), collapse = ", "))

of <- function(d) {
  layer <- lm(s ~ factor(l), d)
  trace <- lm(s ~ e, d)
  both <- lm(s ~ factor(l) * e, d)
  additive <- lm(s ~ factor(l) + e, d)
  test <- function(m) { a <- anova(layer, m); c(a$F[2], a$Df[2], a$Res.Df[2], a[["Pr(>F)"]][2]) }
  models <- list(layer, trace, both, additive)
  p <- c(); r <- c()
  for (l in sort(unique(d$l))) {
    own <- d[d$l == l, ]
    if (sd(own$e) > 0) { t <- cor.test(own$e, own$s); p <- c(p, t$p.value); r <- c(r, unname(t$estimate)) }
  }
  mixed <- c()
  if (all(sapply(split(d$e, d$l), sd) > 0)) {
    small <- lme(s ~ factor(l), random = ~ 1 | f, data = d, method = "ML")
    large <- lme(s ~ factor(l) * e, random = ~ 1 | f, data = d, method = "ML")
    variance <- as.numeric(VarCorr(small)[, 1])
    mixed <- c(2 * (as.numeric(logLik(large)) - as.numeric(logLik(small))), variance[1] / sum(variance))
  }
  paste0("{", paste(c(
    line("r2", sapply(models, function(m) summary(m)$r.squared)),
    line("rmse", sapply(models, function(m) sqrt(mean(residuals(m)^2)))),
    line("mae", sapply(models, function(m) mean(abs(residuals(m))))),
    line("f_interaction", test(both)), line("f_additive", test(additive)),
    line("correlation", r), line("p", p), line("holm", p.adjust(p, "holm")), line("bh", p.adjust(p, "BH")),
    line("mixed", mixed)
  ), collapse = ", "), "}")
}

cat("{\n", '"r": "', R.version.string, '",\n', sep = "")
cat('"varied": ', of(table_of(40, 5, FALSE)), ",\n", sep = "")
cat('"flat layer": ', of(table_of(40, 5, TRUE)), "\n}\n", sep = "")

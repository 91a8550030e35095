# Writes what R finds of the edits of docs/smollm2, as JSON:
# Rscript tests/analysis/r/smollm2.R docs/smollm2/edits.csv > tests/analysis/r/smollm2.json
d <- read.csv(commandArgs(TRUE)[1])
number <- function(x) formatC(x, digits = 17, format = "g")
rows <- c()
for (part in split(d, list(d$problem, d$method, d$window), drop = TRUE)) {
  for (score in c("rewrite", "paraphrase", "neighborhood", "overall")) {
    own <- data.frame(s = part[[score]], l = factor(part$layer), e = part$effect)
    own <- own[!is.na(own$s), ]
    layer <- lm(s ~ l, own)
    trace <- lm(s ~ e, own)
    both <- lm(s ~ l * e, own)
    test <- anova(layer, both)
    values <- number(c(
      summary(layer)$r.squared, summary(trace)$r.squared, summary(both)$r.squared, test$F[2], test$Df[2],
      test$Res.Df[2], test[["Pr(>F)"]][2]
    ))
    key <- sprintf('"%s", "%s", %d, "%s"', part$problem[1], part$method[1], part$window[1], score)
    rows <- c(rows, sprintf("[%s, %s]", key, paste(values, collapse = ", ")))
  }
}
cat("[\n", paste(rows, collapse = ",\n"), "\n]\n", sep = "")

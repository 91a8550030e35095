"""The report's page in a real browser: Debian's chromium, driven by selenium (``make test-browser``)."""

import csv
import json
import re
import shutil
import time

import polars as pl
import pytest
from helpers.made_up_study import edited, traced, write_study
from helpers.odd_texts import ODD, with_odd_texts

from causalcone.analysis import CHECKPOINT_SCHEMA
from causalcone.analysis.page.report import report, report_data
from causalcone.analysis.papers.inputs import AnalysisOptions
from causalcone.analysis.sweep_results import Study

selenium = pytest.importorskip("selenium")
from selenium.webdriver import Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs Debian's chromium and chromium-driver"),
]


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    return written(study, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def odd_page(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return written(with_odd_texts(study, folder / "study"), folder / "report.html")


def written(study, path):
    path.write_text(report(report_data(Study(study), AnalysisOptions(draws=100))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def at(browser):
    """Opens a page and waits until it is drawn; finds elements by their ids."""

    def opened(path):
        browser.get(path.as_uri())
        WebDriverWait(browser, 30).until(lambda it: it.find_element(By.TAG_NAME, "body").get_attribute("data-ready"))
        return lambda name: browser.find_element(By.ID, name)

    return opened


def test_it_opens_without_errors_and_without_a_network(browser, at, page):
    find = at(page)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert [name for name in loaded if name.startswith(("http:", "https:"))] == []
    assert "The choice of the edit layer explains" in find("answer").text
    for name in ("r2", "scores", "windows", "severed", "zeroed", "edits"):
        assert find(name).find_elements(By.CSS_SELECTOR, ".main-svg"), name
        assert find(name).size["width"] > 200
    assert len(find("maps").find_elements(By.CSS_SELECTOR, ".heatmaplayer image, .hm image")) == 2


def test_buttons_of_charts_are_there_for_the_pointer_and_the_keyboard(browser, at, page):
    find = at(page)
    opacity = "return getComputedStyle(arguments[0]).opacity"
    bars = browser.find_elements(By.CSS_SELECTOR, ".modebar")
    assert len(bars) >= 8
    assert {browser.execute_script(opacity, bar) for bar in bars} == {"0"}
    for reach in (
        lambda: ActionChains(browser).move_to_element(find("scores")).perform(),
        lambda: browser.execute_script("document.querySelector('#scores .modebar-btn').focus({preventScroll: true})"),
    ):
        reach()
        shown = [bar for bar in bars if browser.execute_script(opacity, bar) == "1"]
        assert shown == [find("scores").find_element(By.CSS_SELECTOR, ".modebar")]
        ActionChains(browser).move_to_element(find("answer-title")).perform()


def test_every_chart_says_its_number_and_how_sure_it_is(at, page):
    find = at(page)
    for name in ("r2", "scores", "windows", "averages", "severed", "zeroed", "edits"):
        note = find(name).find_element(By.XPATH, "following-sibling::*[1]").text
        assert re.search(r"\b(\d+|[Oo]ne) (edits? of|facts?)\b", note), note
        assert "intervals" in note
    assert "One fact, so without intervals; p(target) is the mean over 2 draws" in find("maps-note").text
    assert find("progress-box").is_displayed() is False


def test_a_study_of_one_method_problem_and_layer(browser, at, study, tmp_path):
    """And one fact; beside it, its own values as a study on record."""
    from causalcone.analysis.papers.table_files import write_table
    from causalcone.analysis.papers.tables import paper_tables

    scores, effects = {"a": (0.4,)}, {"a": (0.1, 0.7)}
    folder = write_study(tmp_path / "study", traced(effects), [edited(scores)])
    tables, _ = paper_tables(Study(folder))
    for table in tables:
        write_table(table, tmp_path / "before")
    about = {"label": "Before", "protocol": tables[0].notes[-1]}
    (tmp_path / "before" / "study.json").write_text(json.dumps(about))
    options = AnalysisOptions(draws=100, beside=str(tmp_path / "before"))
    progress = [("causal tracing", "1 of 1", "1 of 1 fact"), ("error injection", "0 of 2", "0 of 2 edits")]
    data = report_data(Study(folder), options, progress)
    (tmp_path / "page.html").write_text(report(data), encoding="utf-8")
    find = at(tmp_path / "page.html")
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "This sweep is complete: 1 of 2 stages done" in text
    assert "How well edits do, at layer 0" in text
    assert "Means over 1 edit of 1 fact at a layer; no intervals, as there is one fact." in text
    assert "Open marks: on record, Before, over 1 fact" in text
    assert "There is no answer yet: no regression of rewrite scores on the edit layer could be tested" in text
    assert not re.search(r"\b1 (facts|edits|layers|problems|stages)\b", text)
    assert find("averages").is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_explorer_shows_the_chosen_fact_and_its_exact_values(browser, at, page, study):
    find = at(page)
    grid = "return document.querySelector('#maps > div').data[0].z"
    first, text = browser.execute_script(grid), find("fact-text").text
    (answer, *_), likeliest = pl.read_parquet(study / "facts.parquet")["likeliest"][0].to_list(), find("likeliest").text
    assert f"{answer['p']:.3f}" in likeliest
    assert len(find("likeliest").find_elements(By.TAG_NAME, "span")) == 6
    Select(find("facts")).select_by_index(2)
    second = browser.execute_script(grid)
    assert find("fact-text").text != text
    assert first != second
    traces = Study(study).traces.filter(fact_id=Study(study).traces["fact_id"].unique(maintain_order=True)[2])
    for row in traces.filter(kind="hidden", window=1).iter_rows(named=True):
        assert second[row["token"]][row["layer"]] == pytest.approx(row["p_patched"], rel=1e-6)
    hover = browser.execute_script("return document.querySelector('#maps > div').data[0].text[0][1]")
    assert f"layer 1<br>p(target) {second[0][1]:.5g}"[:24] in hover


def test_the_search_finds_subjects(browser, at, page):
    find = at(page)
    every = len(Select(find("facts")).options)
    subject = Select(find("facts")).options[1].text.split(" — ")[0]
    find("search").send_keys(subject)
    found = [option.text for option in Select(find("facts")).options]
    assert 1 <= len(found) < every
    assert all(subject in text for text in found)
    assert f"{len(found)} of {every} facts" in find("found").text
    find("search").send_keys(" nobody")
    assert Select(find("facts")).options == []


def test_it_is_usable_by_keyboard(browser, at, page):
    find = at(page)
    find("search").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "facts"
    before = find("fact-text").text
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert find("fact-text").text != before


def test_scores_follow_the_choice(browser, at, page):
    find = at(page)
    lines = "return document.getElementById('scores').data.map(each => each.y)"
    first = browser.execute_script(lines)
    Select(find("scores-problem")).select_by_value("fact_forcing")
    assert browser.execute_script(lines) != first
    Select(find("r2-score")).select_by_value("overall")
    assert len(browser.execute_script("return document.getElementById('r2').data")) == 4


def test_edits_in_sequence(browser, at, page, tmp_path):
    """A section where there are any: solid lines of the newest batch, dashed ones of the sample before it."""
    assert not at(page)("sequences-box").is_displayed()
    folder = write_study(tmp_path / "study", traced({"a": (0.1, 0.7)}), [edited({"a": (0.4, 0.5)})])
    (folder / "checkpoints").mkdir()
    common = {"problem": "error_injection", "window": 1, "layer": 6}
    rows = [
        {
            **common,
            "method": method,
            "edits": edits,
            "group": group,
            "fact_id": fact,
            "metric": metric,
            "pre": 1.0,
            "post": post,
        }
        for method in ("emmet", "encore")
        for edits in (50, 100)
        for group, fact, metric, post in (
            ("newest", "a", "rewrite_p", 0.75),
            ("newest", "b", "rewrite_p", 0.25),
            ("earlier", "c", "rewrite_p", 0.125),
            ("model", None, "perplexity", 300.0),
        )
    ]
    pl.DataFrame(rows, schema=CHECKPOINT_SCHEMA).write_parquet(folder / "checkpoints" / "part-00000.parquet")
    find = at(written(folder, tmp_path / "page.html"))
    assert find("sequences-box").is_displayed()
    drawn = (
        "return document.getElementById('sequences-plot').data.map(each => [each.name, each.line.dash, each.x, each.y])"
    )
    before = ", sample of all before it"
    assert browser.execute_script(drawn) == [
        [name + group, dash, [50, 100], [p, p]]
        for name in ("EMMET", "ENCORE-1")
        for group, dash, p in ((", newest batch", "solid", 0.5), (before, "dash", 0.125))
    ]
    Select(find("sequences-metric")).select_by_value("perplexity_ratio")
    assert [line[3] for line in browser.execute_script(drawn)] == [[300, 300]] * 2
    first = find("sequences").find_element(By.CSS_SELECTOR, "tbody tr").text
    assert re.match(r"EMMET 50 newest batch 0\.500 . . . 300", first)  # no edit has a score
    errors = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not errors


def test_light_and_dark(browser, at, page):
    find = at(page)
    back = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(back)
    font = browser.execute_script("return document.getElementById('r2').layout.font.color")
    find("theme").click()
    assert browser.execute_script(back) != light
    assert browser.execute_script("return document.getElementById('r2').layout.font.color") != font


def test_the_table_filters_sorts_and_downloads(browser, at, page, downloads):
    find = at(page)

    def rows():
        return [row.text for row in find("table").find_elements(By.CSS_SELECTOR, "tbody tr")]

    every = rows()
    subject = Select(find("facts")).options[1].text.split(" — ")[0]
    find("filter").send_keys(subject)
    assert 1 <= len(rows()) < len(every)
    find("download").click()
    file = downloads / "facts.csv"
    WebDriverWait(browser, 10).until(lambda _: file.exists())
    time.sleep(0.2)
    header, *found = csv.reader(file.read_text(encoding="utf-8").splitlines())
    assert header[:4] == ["fact", "subject", "prompt", "target"]
    assert len(found) == len(rows())
    assert all(subject in " ".join(row) for row in found)
    find("filter").clear()
    find("filter").send_keys(Keys.SPACE, Keys.BACKSPACE)
    button = find("table").find_elements(By.CSS_SELECTOR, "thead button")[4]
    button.click()
    cells = find("table").find_elements(By.CSS_SELECTOR, "tbody td:nth-child(5)")
    values = [float(cell.text) for cell in cells]
    assert values == sorted(values)


def test_texts_from_data_stay_texts(browser, at, odd_page):
    find = at(odd_page)
    assert browser.title == "Does localization inform editing?"
    assert ODD in find("fact-text").text
    labels = browser.execute_script("return document.querySelector('#maps > div .yaxislayer-above').textContent")
    assert "<img" in labels.replace("␣", " ")
    assert browser.find_elements(By.CSS_SELECTOR, "img") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

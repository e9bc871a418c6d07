"""The dashboards in a browser, opened from file://: search, sort, open, hover. Takes Chromium, its
driver and `pip install selenium`; skipped without them."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("chromium or chromedriver is not installed", allow_module_level=True)

from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser and the address of the page."""
    out = tmp_path_factory.mktemp("out")
    flags = ["--saes", "data/tiny", "--layers", "3", "--n-tokens", "30000", "--out", out]
    for program in ("features.py", "heads.py"):
        subprocess.run([sys.executable, program, *flags], cwd=ROOT, check=True, capture_output=True)
    path = out / "tiny" / "features" / "index.html"
    # a token that would be markup if it were not text
    content = path.read_text(encoding="utf8")
    hurting = '"vocab":{"0":"\\u003cscript>window.hurt=1\\u003c/script>"'
    path.write_text(content.replace('"vocab":{"0":"!"', hurting, 1), encoding="utf8")
    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--window-size=1300,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver, path.as_uri()
    driver.quit()


@pytest.fixture
def page(browser):
    """The page as it opens, whatever an earlier test chose on it."""
    driver, address = browser
    driver.get("about:blank")           # else an address that differs in its hash is not read anew
    driver.get(address)
    return driver


def cells(page, column):
    return [row.find_elements(By.TAG_NAME, "td")[column].text for row in
            page.find_elements(By.CSS_SELECTOR, "tbody tr")]


def open_hash(page, hash):
    page.execute_script("location.hash = arguments[0]", hash)


def wait(page, test):
    # while it is, elements that were found are no more
    drawn_anew = [StaleElementReferenceException]
    return WebDriverWait(page, 10, ignored_exceptions=drawn_anew).until(lambda _: test())


def test_it_opens_without_errors_and_lists_features(page):
    assert len(cells(page, 0)) == 100 and cells(page, 0)[0].startswith("3.")
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_sorting_by_frequency_and_back(page):
    button = lambda: next(b for b in page.find_elements(By.CSS_SELECTOR, "th button")
                          if "active at" in b.text)
    number = lambda text: float(text.rstrip("%"))
    button().click()
    down = [number(text) for text in cells(page, 2)[:20]]
    assert down == sorted(down, reverse=True)
    button().click()
    assert number(cells(page, 2)[0]) < down[-1]


def test_searching_and_choosing_a_family(page):
    box = page.find_element(By.CSS_SELECTOR, "input[type=search]")
    box.send_keys("3.10")
    found = cells(page, 0)
    assert found and all("3.10" in name for name in found)
    for _ in range(4):
        box.send_keys("\ue003")                         # backspace
    Select(page.find_elements(By.TAG_NAME, "select")[1]).select_by_value("after a copy")
    assert set(cells(page, 1)) == {"after a copy"}


def test_a_feature_opens_and_a_source_is_found_in_the_text_on_hover(page):
    name = cells(page, 0)[0]
    page.find_element(By.LINK_TEXT, name).click()
    wait(page, lambda: "Feature " + name in page.find_element(By.ID, "page").text)
    text = page.find_element(By.ID, "page").text
    for words in ("share of the decoder", "Logits it raises", "Strongest activations", "each tenth",
                  "by chance", "tokens left"):
        assert words in text
    assert page.find_elements(By.CSS_SELECTOR, ".histogram div")
    underlined = page.find_element(By.CSS_SELECTOR, ".text .plus, .text .less")
    page.execute_script("arguments[0].scrollIntoView()", underlined)
    corner = ActionBuilder(page)                        # else it may point at a source already
    corner.pointer_action.move_to_location(1, 1)
    corner.perform()
    assert not page.find_elements(By.CSS_SELECTOR, ".lit")
    ActionChains(page).move_to_element(underlined).perform()
    assert len(page.find_elements(By.CSS_SELECTOR, ".lit")) == 2, \
        "the token and its line in the list"
    assert "3.0: " in page.find_element(By.CSS_SELECTOR, ".source.lit").get_attribute("title")


def test_heads_and_the_features_of_one(page):
    open_hash(page, "heads")
    wait(page, lambda: len(cells(page, 0)) == 4)
    page.find_element(By.LINK_TEXT, "3.1").click()
    wait(page, lambda: len(cells(page, 0)) > 10)
    assert set(cells(page, 4)) == {"3.1"}


def test_a_feature_that_was_never_active_is_said_to_be_so(page):
    missing = page.execute_script("return [...Array(2048).keys()].find("
                                  "i => !data.features[3].feature.includes(i))")
    open_hash(page, f"3.{missing}")
    sentence = f"Feature 3.{missing} was not active"
    assert wait(page, lambda: sentence in page.find_element(By.ID, "page").text)


def test_a_token_like_a_script_is_text(page):
    assert page.execute_script("return data.vocab[0]") == "<script>window.hurt=1</script>"
    page.execute_script("page.replaceChildren(chip(0))")
    assert page.find_element(By.ID, "page").text == "<script>window.hurt=1</script>"
    assert page.execute_script("return window.hurt") is None

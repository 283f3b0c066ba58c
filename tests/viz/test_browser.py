"""The browser helper notices what the report tests rely on it to notice."""

import pytest
from browser import open_page, screenshot


def test_errors_and_requests_of_a_page_are_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<!DOCTYPE html><title>x</title><img src="http://example.com/a.png"><p id="before"></p>'
        '<script>document.getElementById("before").id = "after"; throw new Error("boom")</script>'
    )
    seen = open_page(page)
    assert 'id="after"' in seen.dom
    assert any("boom" in line for line in seen.console)
    assert seen.requests == ["http://example.com/a.png"]
    assert seen.figures == 0


@pytest.mark.slow  # no test of the default run takes a picture
def test_a_screenshot_is_a_picture(tmp_path):
    (tmp_path / "page.html").write_text("<!DOCTYPE html><p>hello")
    picture = screenshot(tmp_path / "page.html", tmp_path / "a.png", 300, 200)
    assert picture.read_bytes().startswith(b"\x89PNG")

"""The page in a real browser: upload, compare, errors, keyboard alone, a narrow screen, no word to other servers."""

import json
import re
from pathlib import Path


def compare(page) -> None:
    page.get_by_role("button", name="Compare").click()


def told(page, network: str):
    return page.get_by_text(re.compile(f"{re.escape(network)} looks at"))


def upload(page, path: Path) -> None:
    """Give a file to the image input and see it arrive."""
    with page.expect_response(lambda response: "/upload" in response.url and response.status == 200):
        page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_role("button", name="Remove Image").wait_for()


def test_an_uploaded_image_is_compared(tab, shoot, digit):
    page = tab()
    upload(page, digit)
    compare(page)
    told(page, "small: stage-auto").wait_for()
    assert told(page, "small: identity").count() == 1
    assert page.get_by_text(re.compile(r"^\d+%$")).count() == 10  # five of each network
    maps = page.locator("img[src*='/file=']")
    assert maps.count() == 3 and all(maps.nth(k).evaluate("i => i.complete && i.naturalWidth > 60") for k in range(3))
    shoot(page, "compare")


def test_a_sample_goes_through_the_shipped_network_and_its_host_form(tab, shoot):
    page = tab()
    for label, value in (
        ("Or pick a sample", "flower"),
        ("First network", "shipped, its shortcuts taken out"),
        ("Second network", "shipped DSNet-20"),
        ("Method", "layercam"),
    ):
        page.get_by_label(label).click()
        page.get_by_role("option", name=value, exact=True).click()
        page.get_by_role("option").first.wait_for(state="detached")  # a menu fades before the next one opens
    page.get_by_role("button", name="Remove Image").wait_for()
    compare(page)
    told(page, "shipped").nth(0).wait_for()
    told(page, "shipped, unplugged").wait_for()
    shoot(page, "sample")


def test_errors_get_a_message_and_the_server_lives_on(tab, shoot, digit, tmp_path):
    page = tab()
    compare(page)
    alert = page.locator(".ds-error[role=alert]")
    alert.get_by_text("Drop an image or pick a sample first").wait_for()

    broken = tmp_path / "broken.png"
    broken.write_bytes(digit.read_bytes()[:200])
    upload(page, broken)
    compare(page)
    alert.get_by_text("This file is not a whole image").wait_for()
    shoot(page, "error")

    page.get_by_role("button", name="Remove Image").click()
    large = tmp_path / "large.png"
    large.write_bytes(digit.read_bytes() + bytes(11 * 2**20))
    page.locator("input[type=file]").first.set_input_files(large)
    page.get_by_text(re.compile("exceeds|too large|maximum", re.IGNORECASE)).first.wait_for()

    page.reload()
    page.get_by_role("button", name="Compare").wait_for()
    upload(page, digit)
    compare(page)
    told(page, "small: stage-auto").wait_for()
    assert alert.count() == 0


def focused(page) -> str:
    return page.evaluate(
        "(e => e === document.body ? '' : (e.ariaLabel || e.innerText || '').trim())(document.activeElement)"
    )


def tab_to(page, name: str) -> None:
    for _ in range(30):
        page.keyboard.press("Tab")
        if focused(page) == name:
            return
    raise AssertionError(f"the Tab key never comes to {name!r}")


def test_all_is_done_with_the_keyboard_alone(tab, shoot):
    page = tab()
    tab_to(page, "Or pick a sample")
    page.keyboard.type("digit 3")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Remove Image").wait_for()
    tab_to(page, "Method")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    tab_to(page, "Compare")
    shoot(page, "keyboard")
    page.keyboard.press("Enter")
    told(page, "small: stage-auto").wait_for()
    page.get_by_role("tab", name="Look").focus()
    page.keyboard.press("Tab")
    assert focused(page) == "Shortcuts"
    page.keyboard.press("Enter")
    tab_to(page, "Show its shortcuts")
    page.keyboard.press("Enter")
    page.locator(".ds-card").first.wait_for()


def test_shortcut_maps_tell_their_numbers(tab, shoot):
    page = tab()
    page.get_by_role("tab", name="Shortcuts").click()
    page.get_by_label("Network", exact=True).click()
    page.get_by_role("option", name="small: stage-auto").filter(visible=True).click()
    page.get_by_role("button", name="Show its shortcuts").click()
    page.locator(".ds-card").first.wait_for()
    assert page.locator(".ds-card").count() == 3
    says = page.locator(".ds-card").first.locator("rect title").all_text_contents()
    assert len(says) == 18 and re.fullmatch(r"block 3 from map X_2: mean \|w\| [01](\.\d+)?", says[5])
    page.get_by_text("Numbers").first.click()
    assert page.locator(".ds-card").first.locator("tbody tr").count() == 6

    page.get_by_label("Network", exact=True).click()
    page.get_by_role("option", name="shipped DSNet-20").filter(visible=True).click()
    page.get_by_role("button", name="Show its shortcuts").click()
    page.get_by_role("img", name="mean |w| by epoch").first.wait_for(state="detached")
    shoot(page, "shortcuts")


def test_curves_and_benchmarks_are_drawn(tab, shoot):
    page = tab()
    page.get_by_role("tab", name="Curves").click()
    page.get_by_role("button", name="Show curves").click()
    page.get_by_role("img", name="test accuracy").wait_for()
    assert page.locator("svg[aria-label='test loss'] circle").count() == 4  # two networks, two epochs
    shoot(page, "curves")
    page.get_by_role("tab", name="Speed").click()
    page.get_by_role("button", name="Show figures").click()
    row = page.get_by_role("row", name="public_dsnet50")
    row.wait_for()
    assert row.locator("td").nth(3).inner_text() == "1.31x" and row.locator(".ds-bar").count() == 3
    shoot(page, "speed")


def test_a_narrow_screen_needs_no_scrolling_sideways(tab, shoot, digit):
    width = 390
    page = tab(width, 844)
    upload(page, digit)
    compare(page)
    told(page, "small: stage-auto").wait_for()
    shoot(page, "narrow")
    for name, button, shown in (
        ("Shortcuts", "Show its shortcuts", "rect"),
        ("Curves", "Show curves", "circle"),
        ("Speed", "Show figures", ".ds-bar"),
    ):
        page.get_by_role("tab", name=name).click()
        page.get_by_role("button", name=button).click()
        page.locator(f".ds-card {shown}").first.wait_for()
        wide = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
        assert max(wide) <= width, (name, wide)
        edges = page.evaluate(
            "[...document.querySelectorAll('.ds-card, button, input')].filter(e => e.offsetParent)"
            ".map(e => Math.round(e.getBoundingClientRect().right))"
        )
        assert max(edges) <= width, json.dumps(edges)

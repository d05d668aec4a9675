"""The playground as a visitor has it: drawn, bent and read again in a real browser."""

import base64
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Page, Route, expect

from service.manifest import read_manifest
from tests.browser.conftest import LIMIT, Opened
from tests.support.encoded import base64_text, decode, encode
from tests.support.process import served
from tests.support.tiny_model import DIMENSIONS, image_of, write_tiny_model

expect.set_options(timeout=LIMIT)

KEY = "sesame-sesame-sesame"
ROOT = Path(__file__).parents[2]


def file_of(index: int, level: int = 255) -> FilePayload:
    return {"name": "image.png", "mimeType": "image/png", "buffer": encode(image_of(index, level))}


def give(page: Page, index: int, level: int = 255) -> None:
    """Open the picture of a class, and wait until it is read."""
    page.locator("#file").set_input_files(file_of(index, level))
    expect(page.locator("#verdict")).to_contain_text(f"“{index}”")
    expect(page.get_by_role("radio", name=f"{index} {level / 255:.2f}")).to_be_checked()


def move(page: Page, dimension: int, value: float) -> None:
    page.locator(f"#dimension-{dimension}").fill(str(value))


def source(page: Page, picture: str) -> bytes:
    """The bytes of a picture that stands in the page as a data URL."""
    return base64.b64decode((page.locator(f"#{picture}").get_attribute("src") or "").partition(",")[2])


class Gate:
    """Holds requests back until they are let through, one by one."""

    def __init__(self, page: Page, pattern: str) -> None:
        self._page = page
        self._held: list[Route] = []
        self._came = 0
        self._is_open = False
        page.route(pattern, self._hold)

    def _hold(self, route: Route) -> None:
        self._came += 1
        if self._is_open:
            route.continue_()
        else:
            self._held.append(route)

    def wait_for(self, count: int) -> None:
        """Return when so many have come since the beginning."""
        for _ in range(LIMIT // 50):
            if self._came >= count:
                return
            self._page.wait_for_timeout(50)
        raise AssertionError(f"{self._came} requests came, expected {count}")

    def let_through(self) -> None:
        self._held.pop(0).continue_()

    def refuse(self) -> None:
        self._held.pop(0).fulfill(status=503, json={"detail": "Busy."})

    def open(self) -> None:
        """Let everything through from now on."""
        self._is_open = True
        while self._held:
            self.let_through()


def asked_for(page: Page, part: str) -> list[str]:
    """Addresses with this part in them that the page asks for; the list grows."""
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url) if part in request.url else None)
    return addresses


def pictures_sent(page: Page) -> Callable[[], list[dict[str, Any]]]:
    """Gets size and type of each picture that the page sends from now on; Playwright sees no Blob's bytes."""
    page.evaluate(
        """() => {
            const send = window.fetch;
            window.sent = [];
            window.fetch = (address, options) => {
                if (options.body instanceof Blob) window.sent.push(options.body);
                return send(address, options);
            };
        }"""
    )
    return lambda: page.evaluate("window.sent.map(({ size, type }) => ({ size, type }))")


def data_url(picture: bytes) -> str:
    return f"data:image/png;base64,{base64_text(picture)}"


def other_model(models: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a tiny model into `models` whose manifest `change` has changed; its folder."""
    folder = write_tiny_model(models)
    written = json.loads((folder / "manifest.json").read_text())
    change(written)
    (folder / "manifest.json").write_text(json.dumps(written))
    return folder


def ask(service: str, path: str, document: dict[str, Any]) -> dict[str, Any]:
    answer = httpx2.post(f"{service}/{path}", json=document)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def decoded(picture: str) -> bytes:
    return base64.b64decode(picture.partition(",")[2])


def test_a_visitor_finds_an_example_that_was_read(page: Page) -> None:
    """Nobody has to draw first to see what the page is for."""
    expect(page.locator("#verdict")).to_contain_text("This is")
    expect(page.locator("#seen")).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    expect(page.locator("#dimensions li")).to_have_count(DIMENSIONS)


def test_a_file_is_read(page: Page) -> None:
    """Class, capsule lengths and the three pictures are those of the service's answer."""
    give(page, 3, level=204)
    expect(page.locator("#verdict")).to_have_text("This is “3”.")
    lengths = page.locator("#classes label").all_text_contents()
    assert lengths == [f"{index}{'0.80' if index == 3 else '0.00'}" for index in range(10)]
    expect(page.locator("#tweaked-caption")).to_contain_text("read again as “3”, 0.80")
    assert np.array_equal(decode(source(page, "seen")), image_of(3, 204))
    assert source(page, "tweaked") == source(page, "reconstruction")
    expect(page.locator("#error")).to_have_text(", error 0.0")
    facts = "CapsNet, 1 routing iteration, 0.0 million parameters, 0.00 % test error; runs on cpu in fp32"
    expect(page.locator("#model-facts")).to_have_text(facts)


def test_a_picture_may_come_before_the_models(opened: Opened, service: str) -> None:
    """What is opened while the page still asks what is served is read, and no example takes its place."""
    page = opened(service)
    gate = Gate(page, "**/models")
    page.goto(service)
    gate.wait_for(1)
    page.locator("#file").set_input_files(file_of(3))
    page.wait_for_timeout(300)  # until it is decoded
    gate.let_through()
    expect(page.locator("#verdict")).to_have_text("This is “3”.")
    page.wait_for_timeout(300)
    expect(page.locator("#verdict")).to_have_text("This is “3”.")


def test_an_unusual_image_is_called_so(page: Page, service: str) -> None:
    """The page says so of what the service does not find in distribution."""
    odd = image_of(3)
    odd[0, :] = odd[1, :] = 255  # light that the decoder never draws
    answer = httpx2.post(
        f"{service}/predict?preprocess=none", content=encode(odd), headers={"content-type": "image/png"}
    )
    assert answer.json()["predictions"][0]["in_distribution"] is False
    page.route("**/predict?*", lambda route: route.continue_(url=f"{route.request.url}&preprocess=none"))
    page.locator("#file").set_input_files(
        {"name": "odd.png", "mimeType": "image/png", "buffer": encode(odd)},
    )
    expect(page.locator("#verdict")).to_contain_text("“3”. But it is unusual")


def test_sliders_have_the_names_and_effects_of_the_chosen_class(page: Page) -> None:
    """They are the manifest's, and change with the class whose capsule is drawn."""
    give(page, 3)
    named = page.get_by_role("slider", name="4 light 4 of 3")
    expect(named).to_have_accessible_description("ink +50.0 %")
    page.get_by_role("radio", name="7 0.00").check()
    expect(named).to_have_count(0)
    expect(page.get_by_role("slider", name=re.compile("light .* of 7"))).to_have_count(DIMENSIONS)


def test_a_slider_bends_the_picture(page: Page, service: str) -> None:
    """The picture is what /reconstruct draws with the same tweaks, and it is read again."""
    give(page, 3, level=102)
    move(page, 5, 0.2)
    move(page, 9, -0.1)
    expect(page.locator("#tweaked-caption")).to_have_text("“3”, bent: read again as “3”, 0.50")
    image = data_url(encode(image_of(3, 102)))
    tweaks = [{"dimension": 5, "delta": 0.2}, {"dimension": 9, "delta": -0.1}]
    drawn = ask(service, "reconstruct", {"image": image, "tweaks": tweaks})
    assert source(page, "tweaked") == decoded(drawn["reconstruction"])
    page.get_by_role("button", name="Reset the sliders").click()
    expect(page.locator("#dimension-5")).to_have_value("0")
    expect(page.locator("#tweaked-caption")).to_have_text("“3”, as it is: read again as “3”, 0.40")
    move(page, 5, 0.2)
    expect(page.locator("#tweaked-caption")).to_contain_text("0.60")
    page.locator("#dimension-5").dblclick()
    expect(page.locator("#dimension-5")).to_have_value("0")


def test_another_class_draws_from_its_own_capsule(page: Page) -> None:
    """The capsule of a class that is not there draws nothing, until a slider lengthens it."""
    give(page, 3)
    page.get_by_role("radio", name="8 0.00").check()
    expect(page.locator("#tweaked-caption")).to_contain_text("“8”, as it is")
    move(page, 0, 0.25)
    expect(page.locator("#tweaked-caption")).to_have_text("“8”, bent: read again as “8”, 0.25")


def test_strips_are_the_sweep_and_set_their_slider(page: Page, service: str) -> None:
    """Each drawing is that of the sweep, and stands for the value under it."""
    give(page, 3, level=102)
    image = data_url(encode(image_of(3, 102)))
    swept = ask(service, "reconstruct/sweep", {"image": image})
    strips = page.locator("#dimensions .strip")
    expect(strips.nth(DIMENSIONS - 1).locator("img")).to_have_count(len(swept["deltas"]))
    for dimension in (0, DIMENSIONS - 1):
        shown = strips.nth(dimension).locator("img")
        for column, drawing in enumerate(swept["reconstructions"][dimension]):
            expect(shown.nth(column)).to_have_attribute("src", drawing)
    strips.nth(6).locator("img").nth(9).click()
    expect(page.locator("#dimension-6")).to_have_value(str(swept["deltas"][9]))
    expect(page.locator("#tweaked-caption")).to_contain_text("0.60")
    assert source(page, "tweaked") == decoded(swept["reconstructions"][6][9])


def test_a_slider_stands_under_the_drawing_of_its_value(page: Page) -> None:
    """At either end of its range the handle's middle is below that of the first and the last drawing."""
    give(page, 3)
    images = page.locator("#dimensions .strip").first.locator("img")
    expect(images).to_have_count(11)
    first, last = images.first.bounding_box(), images.last.bounding_box()
    track = page.locator("#dimension-0").bounding_box()
    assert first
    assert last
    assert track
    handle = 16  # pixels wide, and inside the track at both ends
    assert track["x"] + handle / 2 == pytest.approx(first["x"] + first["width"] / 2, abs=1)
    assert track["x"] + track["width"] - handle / 2 == pytest.approx(last["x"] + last["width"] / 2, abs=1)


def test_keys_move_a_slider(page: Page) -> None:
    """Nobody needs a pointer to bend a picture: an arrow is a fifth of the strip's step."""
    give(page, 3, level=102)
    page.locator("#dimension-2").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#dimension-2")).to_have_value("0.24")
    expect(page.locator("#dimension-2")).to_have_attribute("aria-valuetext", "+0.24")
    expect(page.locator("#tweaked-caption")).to_contain_text("0.64")


def test_strokes_are_read_while_they_are_drawn(page: Page) -> None:
    """A stroke is an image as the network sees it; without any there is nothing to bend."""
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    expect(page.locator("#dimension-0")).to_be_disabled()
    expect(page.get_by_role("radio", name="3", exact=True)).to_be_disabled()
    sweeps = asked_for(page, "sweep")
    box = page.locator("#pad").bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 40, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 40, middle, steps=5)
    expect(page.locator("#verdict")).to_contain_text("This is")
    assert not sweeps, "while the pointer is down nobody looks at strips"
    page.mouse.up()
    expect(page.locator(".strip").first).to_be_visible()
    assert sweeps
    expect(page.locator("#dimension-0")).to_be_enabled()
    expect(page.locator("#seen")).to_have_attribute("src", re.compile("^data:"))
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#verdict")).to_have_text("Draw something.")


def test_a_tap_is_a_dot(page: Page) -> None:
    """A press without a movement leaves ink."""
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    page.locator("#pad").click(button="right")
    page.wait_for_timeout(300)
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    page.locator("#pad").click()
    expect(page.locator("#verdict")).to_contain_text("This is")
    first = page.locator("#seen").get_attribute("src")
    page.locator("#pad").click(position={"x": 40, "y": 40})
    expect(page.locator("#seen")).not_to_have_attribute("src", first or "")
    page.get_by_role("button", name="Undo").click()  # the second dot alone
    expect(page.locator("#seen")).to_have_attribute("src", first or "")


def test_undo_brings_back_what_was_replaced(page: Page) -> None:
    """A drawing or a picture that Clear, an example or a file took away is not lost, step by step."""
    verdict, seen = page.locator("#verdict"), page.locator("#seen")
    undo = page.get_by_role("button", name="Undo")
    page.get_by_role("button", name="Clear").click()
    expect(verdict).to_have_text("Draw something.")
    page.locator("#pad").click(position={"x": 60, "y": 60})
    expect(verdict).to_contain_text("This is")
    drawing = seen.get_attribute("src") or ""
    give(page, 3)
    page.get_by_role("button", name="Example 7").click()
    expect(verdict).not_to_have_text("This is “3”.")
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Clear").click()
    expect(verdict).to_have_text("Draw something.")
    undo.click()
    expect(verdict).to_contain_text("This is")
    undo.click()
    expect(verdict).to_have_text("This is “3”.")
    undo.click()
    expect(seen).to_have_attribute("src", drawing)
    undo.click()
    expect(verdict).to_have_text("Draw something.")


def test_undo_ends_where_its_memory_does(page: Page) -> None:
    """Only so many steps are kept, and beyond them nothing is taken away, nor read anew."""
    press_often = "(button, times) => { while (times--) button.click(); }"
    page.get_by_role("button", name="Example 7").evaluate(press_often, 60)
    undo = page.get_by_role("button", name="Undo")
    undo.evaluate(press_often, 60)
    read = asked_for(page, "predict")
    wait_for_silence(page, read)
    expect(page.locator("#verdict")).to_contain_text("This is")
    before = len(read)
    undo.click()
    wait_for_silence(page, read)
    assert len(read) == before


def wait_for_silence(page: Page, asked: list[str]) -> None:
    """Return when the page has asked for nothing more for a second."""
    seen = -1
    while len(asked) > seen:
        seen = len(asked)
        page.wait_for_timeout(1000)


def test_a_cancelled_stroke_ends(page: Page) -> None:
    """Where the system takes the pointer away, what it does afterwards is no ink."""
    page.get_by_role("button", name="Clear").click()
    press(page)
    cancel = 'new PointerEvent("pointercancel", { pointerId: 1 })'
    page.evaluate(f"""document.getElementById("pad").dispatchEvent({cancel})""")
    expect(page.locator(".strip").first).to_be_visible()
    before = page.locator("#seen").get_attribute("src")
    drag(page)
    page.wait_for_timeout(500)
    assert page.locator("#seen").get_attribute("src") == before
    page.mouse.up()


def test_clearing_ends_a_stroke(page: Page) -> None:
    """A stroke that goes on after its pad was cleared leaves nothing."""
    page.get_by_role("button", name="Clear").click()
    press(page)
    page.evaluate("""document.getElementById("clear").click()""")
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    drag(page)
    page.mouse.up()
    page.wait_for_timeout(300)
    expect(page.locator("#verdict")).to_have_text("Draw something.")


def press(page: Page) -> None:
    page.locator("#pad").hover()
    page.mouse.down()
    expect(page.locator("#verdict")).to_contain_text("This is")


def drag(page: Page) -> None:
    box = page.locator("#pad").bounding_box()
    assert box
    page.mouse.move(box["x"] + 20, box["y"] + 20, steps=5)


def test_two_fingers_draw_until_both_are_lifted(page: Page) -> None:
    """While one of two pointers still draws nobody looks at strips."""
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    sweeps = asked_for(page, "sweep")
    for what, pointer in (("down", 11), ("down", 12), ("up", 11)):
        finger(page, what, pointer)
    expect(page.locator("#verdict")).to_contain_text("This is")
    page.wait_for_timeout(500)
    assert not sweeps
    finger(page, "up", 12)
    expect(page.locator(".strip").first).to_be_visible()
    assert sweeps


def test_a_finger_that_rests_while_its_stroke_is_cleared_holds_nothing_up(page: Page) -> None:
    """The strips of what another one drew come when the last finger is lifted, whichever drew."""
    expect(page.locator("#verdict")).to_contain_text("This is")
    finger(page, "down", 11)
    page.get_by_role("button", name="Clear").dispatch_event("click")
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    finger(page, "down", 12)
    finger(page, "up", 12)
    expect(page.locator("#verdict")).to_contain_text("This is")
    finger(page, "up", 11)
    expect(page.locator(".strip").first).to_be_visible()


def finger(page: Page, what: str, pointer: int) -> None:
    page.locator("#pad").evaluate("pad => (pad.setPointerCapture = () => {})")  # no such pointer is there
    page.locator("#pad").dispatch_event(f"pointer{what}", {"pointerId": pointer, "button": 0})


def test_a_pen_that_rests_draws_nothing(page: Page) -> None:
    """Events of a pen's pressure, say, without any movement are no part of a stroke."""
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    box = page.locator("#pad").bounding_box()
    assert box
    browser = page.context.new_cdp_session(page)

    def pen(what: str, force: float, right: float = 50.5) -> None:
        place = {"x": box["x"] + right, "y": box["y"] + 60.25}
        kind = {"pointerType": "pen", "button": "left", "buttons": 1, "clickCount": 1}
        browser.send("Input.dispatchMouseEvent", {"type": what, "force": force, **place, **kind})

    pen("mousePressed", 0.2)
    expect(page.locator("#verdict")).to_contain_text("This is")
    asked = asked_for(page, "capsules=true")
    for force in (0.3, 0.4, 0.5):
        pen("mouseMoved", force)
    page.wait_for_timeout(300)
    assert not asked
    with page.expect_request("**/predict?*capsules=true*"):  # however busy the machine is
        pen("mouseMoved", 0.5, right=60.5)
    pen("mouseReleased", 0, right=60.5)


def test_a_picture_that_was_encoded_late_is_forgotten(page: Page) -> None:
    """Encoding takes its time: what was cleared meanwhile does not come back."""
    expect(page.locator("#verdict")).to_contain_text("This is")
    encode_late(page)
    page.get_by_role("button", name="Example 7").click()
    page.get_by_role("button", name="Clear").click()
    page.wait_for_timeout(1000)
    expect(page.locator("#verdict")).to_have_text("Draw something.")


def test_answers_that_come_late_are_forgotten(page: Page) -> None:
    """What was asked before the visitor went on is not shown beside what they went on to."""
    give(page, 3, level=102)
    expect(page.locator(".strip").first).to_be_visible()

    gate = Gate(page, "**/reconstruct?*")
    move(page, 5, 0.2)
    gate.wait_for(1)
    page.get_by_role("radio", name="8 0.00").check()
    gate.let_through()
    gate.wait_for(2)
    assert page.locator("#tweaked").get_attribute("src") is None, "the bent 3 under the name of 8"
    gate.open()
    expect(page.locator("#tweaked-caption")).to_contain_text("“8”, as it is")

    gate = Gate(page, "**/reconstruct/sweep?*")
    page.get_by_role("radio", name="7 0.00").check()
    gate.wait_for(1)
    page.get_by_role("radio", name="3 0.40").check()
    gate.let_through()
    gate.wait_for(2)
    expect(page.locator(".strip").first).to_be_hidden()
    gate.open()
    expect(page.locator(".strip").first).to_be_visible()


def test_a_late_second_reading_is_forgotten(page: Page) -> None:
    """What the picture was read as before the slider went on is not said of the one after."""
    give(page, 3, level=102)
    expect(page.locator("#tweaked-caption")).to_contain_text("read again as “3”, 0.40")
    gate = Gate(page, "**/predict?*preprocess=none")
    move(page, 5, 0.2)
    gate.wait_for(1)
    before = source(page, "tweaked")
    move(page, 5, 0.1)
    expect(page.locator("#tweaked")).not_to_have_attribute("src", data_url(before))
    gate.let_through()
    gate.wait_for(2)
    expect(page.locator("#tweaked-caption")).not_to_contain_text("0.60")
    gate.let_through()
    expect(page.locator("#tweaked-caption")).to_contain_text("0.50")


def test_a_late_prediction_is_forgotten(page: Page) -> None:
    """Of two pictures, and of two models, the last one counts, whichever answer comes last."""
    give(page, 3)
    gate = Gate(page, "**/predict?*capsules=true*")
    page.locator("#file").set_input_files(file_of(4))
    gate.wait_for(1)
    page.locator("#file").set_input_files(file_of(5))
    page.wait_for_timeout(500)  # until it is decoded
    gate.let_through()
    gate.wait_for(2)
    expect(page.locator("#verdict")).to_have_text("Reading…")
    page.get_by_label("Model").select_option("tiny 1")
    expect(page.locator("#verdict")).to_have_text("Reading…")
    gate.let_through()
    gate.wait_for(3)
    expect(page.locator("#verdict")).to_have_text("Reading…")
    gate.let_through()
    expect(page.locator("#verdict")).to_have_text("This is “5”.")


def test_the_old_picture_rests_while_the_next_is_read(page: Page) -> None:
    """The page says that it reads, and nobody bends or saves what is about to be replaced."""
    give(page, 3, level=102)
    gate = Gate(page, "**/predict?*capsules=true*")
    bent = asked_for(page, "reconstruct?")
    page.get_by_role("button", name="Example 7").click()
    gate.wait_for(1)
    expect(page.locator("#verdict")).to_have_text("Reading…")
    expect(page.locator("#output")).to_have_attribute("aria-busy", "true")
    page.locator("#dimension-5").focus()
    page.keyboard.press("End")
    page.locator("#dimension-5").click(force=True, position={"x": 20, "y": 5})
    page.get_by_role("radio", name="8 0.00").focus()
    page.keyboard.press("Space")
    expect(page.locator("#dimension-5")).to_have_value("0")
    assert not bent
    gate.open()
    expect(page.locator("#verdict")).to_contain_text("This is")
    expect(page.locator("#output")).to_have_attribute("aria-busy", "false")


def test_a_stroke_does_not_dim_what_it_changes(page: Page) -> None:
    """While the pointer is down each reading is followed by another, and the one before stays."""
    page.get_by_role("button", name="Clear").click()
    press(page)
    gate = Gate(page, "**/predict?*capsules=true*")
    drag(page)
    gate.wait_for(1)
    page.wait_for_timeout(500)
    expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#verdict")).to_contain_text("This is")
    page.mouse.up()
    expect(page.locator("#verdict")).to_have_text("Reading…")
    gate.open()


def test_the_pad_rests_under_a_stroke(page: Page) -> None:
    """Complaints come and go before and after it, or its line would have a step."""
    page.locator("#file").set_input_files(NOTHING)
    alert = page.get_by_role("alert")
    expect(alert).to_be_visible()
    draw_on_what_rests(page)
    expect(alert).to_be_hidden()
    page.route("**/predict?*", lambda route: route.fulfill(status=500, json={"detail": "Broken."}))
    draw_on_what_rests(page)
    expect(alert.get_by_role("paragraph")).to_have_text(["Broken."])


NOTHING: FilePayload = {"name": "a.png", "mimeType": "image/png", "buffer": b""}


def encode_late(page: Page) -> None:
    """Have whatever is drawn from now on reach the page half a second later."""
    page.evaluate(
        """() => {
            const encode = HTMLCanvasElement.prototype.toBlob;
            HTMLCanvasElement.prototype.toBlob = function (done, ...rest) {
                encode.call(this, (blob) => setTimeout(() => done(blob), 500), ...rest);
            };
        }"""
    )


def test_a_complaint_stays_until_the_visitor_goes_on(page: Page) -> None:
    """What was drawn before the file that cannot be read, and comes after it, does not take it away."""
    expect(page.locator("#verdict")).to_contain_text("This is")
    encode_late(page)
    page.get_by_role("button", name="Example 3").click()
    page.locator("#file").set_input_files(NOTHING)
    alert = page.get_by_role("alert")
    expect(alert).to_be_visible()
    page.wait_for_timeout(1000)
    expect(alert).to_contain_text("cannot open “a.png”")
    page.get_by_role("button", name="Example 3").click()
    expect(alert).to_be_hidden()


@pytest.mark.parametrize("encoded", [False, True])
def test_of_a_picture_that_was_left_nothing_is_complained(page: Page, encoded: bool) -> None:
    """Its strips fail once another was drawn: before that one is encoded, and while it is read."""
    expect(page.locator(".strip").first).to_be_visible()
    strips = Gate(page, "**/reconstruct/sweep?*")
    page.get_by_role("button", name="Example 4").click()
    strips.wait_for(1)
    reading = Gate(page, "**/predict?*capsules=true*")
    if not encoded:
        encode_late(page)
    page.get_by_role("button", name="Example 3").click()
    if encoded:
        reading.wait_for(1)
    strips.refuse()
    if not encoded:
        reading.wait_for(1)
    page.wait_for_timeout(300)
    expect(page.get_by_role("alert")).to_be_hidden()
    reading.open()
    strips.open()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_file_may_come_before_the_models(page: Page) -> None:
    """The page is there before it knows them; when it does, it draws no example over what it complains of."""
    gate = Gate(page, "**/models")
    page.reload()
    gate.wait_for(1)
    page.locator("#file").set_input_files(NOTHING)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("cannot open “a.png”")
    gate.open()
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    page.wait_for_timeout(300)
    expect(alert).to_contain_text("cannot open “a.png”")


def draw_on_what_rests(page: Page) -> None:
    pad = page.locator("#pad")
    before = pad.bounding_box()
    pad.hover()
    page.mouse.down()
    drag(page)
    page.wait_for_timeout(300)
    assert pad.bounding_box() == before
    page.mouse.up()


def test_a_refusal_leaves_nothing_of_the_picture_before(page: Page) -> None:
    """Beside a picture that could not be read stands no other one's reading."""
    give(page, 3)
    busy = {"detail": "Busy.", "expected": "patience"}
    page.route("**/predict?*", lambda route: route.fulfill(status=503, json=busy))
    page.locator("#file").set_input_files(file_of(4))
    expect(page.get_by_role("alert")).to_contain_text("Busy.Expected: patience")
    expect(page.locator("#verdict")).to_have_text("")
    assert page.locator("#seen").get_attribute("src") is None
    page.unroute("**/predict?*")
    give(page, 5)

    page.route("**/reconstruct?*", lambda route: route.fulfill(status=503, json=busy))
    move(page, 5, -0.2)
    expect(page.get_by_role("alert")).to_contain_text("Busy.")
    expect(page.get_by_role("alert")).to_be_in_viewport()
    assert page.locator("#tweaked").get_attribute("src") is None
    page.unroute("**/reconstruct?*")

    move(page, 5, -0.1)
    expect(page.locator("#tweaked-caption")).to_contain_text("read again as “5”, 0.90")
    page.route("**/predict?*", lambda route: route.fulfill(status=503, json=busy))
    move(page, 5, -0.2)
    expect(page.get_by_role("alert")).to_contain_text("Busy.")
    expect(page.locator("#tweaked-caption")).to_have_text("“5”, bent")


def test_a_busy_service_is_asked_again(page: Page, service: str) -> None:
    """A refusal that names a time ends nothing: neither the page's beginning nor a picture's reading."""
    for pattern in ("**/models", "**/predict?*capsules=true*"):
        refuse(page, pattern, times=1)
    page.goto(service)
    expect(page.locator("#verdict")).to_contain_text("This is")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_busy_service_is_not_asked_for_ever(page: Page) -> None:
    """Nor for what was superseded: the newer picture has its own turns, after which the refusal is said."""
    asked = reading_while_busy(page, first_rest=5)  # or a slow machine would ask again before the newer one
    page.locator("#file").set_input_files(file_of(5))
    expect(page.get_by_role("alert")).to_contain_text("Busy.")
    assert len(asked) == 5


def test_a_figure_that_was_asked_for_again_is_not_refused(page: Page) -> None:
    """Whoever presses a button again while the service is busy gets what it gives then, and no refusal."""
    give(page, 3)
    expect(page.locator(".strip").first).to_be_visible()
    refuse(page, "**/reconstruct/sweep?*", times=1)
    with page.expect_download():
        for _ in range(2):
            page.locator("#figure").click()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_cleared_picture_is_not_asked_for_again(page: Page) -> None:
    """After Clear a busy service is left alone."""
    asked = reading_while_busy(page)
    page.locator("#clear").click()
    page.wait_for_timeout(2000)
    assert len(asked) == 1


def reading_while_busy(page: Page, first_rest: int = 1) -> list[str]:
    """Has a picture read by a service that refuses five times; gets the addresses that are asked for it."""
    give(page, 3)
    asked = asked_for(page, "capsules=true")
    for times, rest in ((4, 1), (1, first_rest)):  # the route that was added last comes first
        refuse(page, "**/predict?*capsules=true*", times, rest)
    page.locator("#file").set_input_files(file_of(4))
    expect(page.locator("#verdict")).to_have_text("Reading…")
    return asked


def refuse(page: Page, pattern: str, times: int, rest: int = 1) -> None:
    """So many times, with so many seconds to rest."""

    def answer(route: Route) -> None:
        route.fulfill(status=503, json={"detail": "Busy."}, headers={"Retry-After": str(rest)})

    page.route(pattern, answer, times=times)


def test_strips_that_failed_come_with_the_next_slider(page: Page) -> None:
    """Whoever goes on after a refusal of the sweep has its strips without choosing the class anew."""
    give(page, 3)
    expect(page.locator(".strip").first).to_be_visible()
    page.route("**/reconstruct/sweep?*", lambda route: route.fulfill(status=503, json={"detail": "Busy."}))
    page.get_by_role("radio", name="4", exact=False).first.check()
    expect(page.get_by_role("alert")).to_contain_text("Busy.")
    expect(page.locator(".strip").first).to_be_hidden()
    page.unroute("**/reconstruct/sweep?*")
    move(page, 5, -0.1)
    expect(page.locator(".strip").first).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_late_refusal_of_strips_is_not_said(page: Page) -> None:
    """Strips that are refused once another class was chosen are nobody's concern; that class has its own."""
    give(page, 3)
    held: list[Route] = []

    def hold_first(route: Route) -> None:
        if held:
            route.continue_()
        held.append(route)

    page.route("**/reconstruct/sweep?*", hold_first)
    with page.expect_request("**/reconstruct/sweep?*"):
        page.get_by_role("radio", name="4", exact=False).first.check()
    page.get_by_role("radio", name="5", exact=False).first.check()
    held[0].fulfill(status=503, json={"detail": "Busy."})
    expect(page.locator(".strip").first).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_late_refusal_is_not_said(page: Page) -> None:
    """What is refused after the visitor went on to another picture or another value is nobody's concern."""
    give(page, 3, level=102)
    expect(page.locator("#tweaked-caption")).to_contain_text("read again as “3”, 0.40")
    bending = Gate(page, "**/reconstruct?*")
    move(page, 5, 0.2)
    bending.wait_for(1)
    move(page, 5, 0.1)
    bending.refuse()
    bending.wait_for(2)
    bending.open()
    expect(page.locator("#tweaked-caption")).to_contain_text("bent: read again as “3”, 0.50")
    expect(page.get_by_role("alert")).to_be_hidden()

    reading = Gate(page, "**/predict?*preprocess=none")
    move(page, 5, 0.2)
    reading.wait_for(1)
    page.get_by_role("button", name="Clear").click()
    with page.expect_event("requestfinished"):
        reading.refuse()
    page.wait_for_timeout(200)
    expect(page.locator("#verdict")).to_have_text("Draw something.")
    expect(page.get_by_role("alert")).to_be_hidden()


# The first picture takes its time until it is decoded.
SLOW_DECODING = """(() => {
    const decode = createImageBitmap;
    let calls = 0;
    window.createImageBitmap = async (file) => {
        if (calls++ === 0) await new Promise((done) => setTimeout(done, 700));
        return decode(file);
    };
})()"""


def test_a_file_that_is_decoded_slowly_is_not_lost(page: Page, service: str) -> None:
    """Neither the first example nor a model's redrawn strokes take its place, for nobody asked for them."""
    page.add_init_script(SLOW_DECODING)
    gate = Gate(page, "**/models")
    page.goto(service)
    gate.wait_for(1)
    page.locator("#file").set_input_files(file_of(4))
    gate.open()
    expect(page.locator("#verdict")).to_have_text("This is “4”.")

    page.reload()
    expect(page.locator("#verdict")).to_contain_text("This is")
    page.locator("#file").set_input_files(file_of(4))
    page.get_by_label("Model").select_option("tiny 1")
    expect(page.locator("#verdict")).to_have_text("This is “4”.")


def test_the_last_of_two_files_counts(page: Page) -> None:
    """However long the first one takes to be decoded."""
    give(page, 3)
    page.evaluate(SLOW_DECODING)
    page.locator("#file").set_input_files(file_of(4))
    give(page, 5)
    page.wait_for_timeout(1000)
    expect(page.locator("#verdict")).to_have_text("This is “5”.")


def test_a_stroke_that_adds_nothing_leaves_the_choice(page: Page) -> None:
    """The last answer of a stroke is that of the one before; a class chosen in between stays."""
    page.get_by_role("button", name="Clear").click()
    press(page)
    page.get_by_role("radio", name=re.compile("^8 ")).press("Space")
    page.mouse.up()
    expect(page.locator(".strip").first).to_be_visible()
    expect(page.get_by_role("radio", name=re.compile("^8 "))).to_be_checked()


def test_an_example_begins_anew(page: Page) -> None:
    """Who bent it, or chose another class, has it as it was at another press."""
    example = page.get_by_role("button", name="Example 7")
    give(page, 3)
    example.click()
    caption = page.locator("#tweaked-caption")
    expect(page.locator("#verdict")).not_to_have_text("This is “3”.")
    expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
    expect(caption).to_contain_text("as it is: read again")
    found = caption.text_content() or ""
    page.locator("#classes input:not(:checked)").first.check()
    move(page, 0, 0.25)
    expect(caption).to_contain_text("bent: read again")
    example.click()
    expect(caption).to_have_text(found)
    expect(page.locator("#dimension-0")).to_have_value("0")


def test_a_large_photograph_is_made_smaller(page: Page, service: str) -> None:
    """A telephone's picture is sent as a fraction of a megabyte, and looks the same to the network."""
    paper = np.random.default_rng(0).normal(200, 8, (3000, 4000))
    paper[1000:1300, 1500:2300] -= 150  # a bar with a foot
    paper[1300:2100, 2000:2300] -= 150
    photograph = encode(paper.clip(0, 255).astype(np.uint8), "JPEG")
    give(page, 3)
    sent = pictures_sent(page)
    before = page.locator("#seen").get_attribute("src")
    page.locator("#file").set_input_files(
        {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photograph}
    )
    expect(page.locator("#seen")).not_to_have_attribute("src", before or "")
    expect(page.get_by_role("alert")).to_be_hidden()
    (picture,) = sent()
    assert picture["size"] < 700_000
    whole = httpx2.post(
        f"{service}/predict?image=true", content=photograph, headers={"content-type": "image/jpeg"}
    )
    seen = decode(decoded(whole.json()["predictions"][0]["image"])).astype(int)
    assert abs(decode(source(page, "seen")) - seen).mean() < 3


@pytest.mark.parametrize(("image_format", "media_type"), [("AVIF", "image/avif"), ("ICO", "image/x-icon")])
def test_what_the_browser_can_show_can_be_read(page: Page, image_format: str, media_type: str) -> None:
    """The service takes five formats; a small picture of another is sent as PNG, as a large one is."""
    give(page, 3)
    sent = pictures_sent(page)
    picture = encode(np.kron(image_of(4), np.ones((4, 4), np.uint8)), image_format)
    page.locator("#file").set_input_files(
        {"name": "picture", "mimeType": media_type, "buffer": picture},
    )
    expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#verdict")).not_to_have_text("This is “3”.")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert [each["type"] for each in sent()] == ["image/png"]


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "PNG"])
def test_the_network_sees_a_turned_picture_as_the_pad_shows_it(page: Page, image_format: str) -> None:
    """Whether or not this browser heeds a camera's note of how it was held: Chromium does, except in WebP."""
    give(page, 3)
    lying = np.zeros((60, 100), np.uint8)
    lying[25:35, 20:80] = 255  # upright, a vertical bar
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90° clockwise
    before = page.locator("#seen").get_attribute("src")
    page.locator("#file").set_input_files(
        {
            "name": "picture",
            "mimeType": f"image/{image_format.lower()}",
            "buffer": encode(lying, image_format, exif=exif),
        },
    )
    expect(page.locator("#seen")).not_to_have_attribute("src", before or "")
    rows, columns = np.nonzero(decode(source(page, "seen")) > 128)
    corners = "(pad) => [...pad.getContext('2d').getImageData(84, 84, 57, 57).data]"
    pad = np.array(page.locator("#pad").evaluate(corners)).reshape(57, 57, 4)
    upright = np.ptp(rows) > np.ptp(columns)
    assert (pad[0, -1, 0] > 128) == upright, "above the middle"
    assert (pad[-1, 0, 0] > 128) == (not upright), "left of the middle"


def test_an_answer_from_something_else_is_called_so(page: Page) -> None:
    """A proxy's own page with status 200 is no answer."""
    give(page, 3)
    page.route("**/reconstruct?*", lambda route: route.fulfill(body="<p>Sign in</p>"))
    move(page, 5, 0.2)
    expect(page.get_by_role("alert")).to_contain_text("something in between")


def test_a_model_is_chosen(page: Page) -> None:
    """Another model reads the same picture; one without measured dimensions has them by number."""
    give(page, 3)
    expect(page.locator("#measured")).to_be_visible()
    page.get_by_label("Model").select_option("tiny 1")
    expect(page.get_by_role("slider", name="4 dimension 4")).to_have_count(1)
    expect(page.locator("#measured")).to_be_hidden()
    expect(page.get_by_role("radio", name="3 1.00")).to_be_checked()
    expect(page.locator("#curl")).to_contain_text("model=tiny%2F1")
    page.get_by_label("Model").select_option("colour 1")
    expect(page.locator("#curl")).to_contain_text("model=colour%2F1")


def test_another_model_reads_a_drawing_once(page: Page) -> None:
    """The pad draws anew for a model, whose reading of the old drawing nobody would see."""
    page.get_by_role("button", name="Clear").click()
    page.locator("#pad").click()
    expect(page.locator(".strip").first).to_be_visible()
    readings = asked_for(page, "image=true")
    page.get_by_label("Model").select_option("tiny 1")
    expect(page.locator("#tweaked-caption")).to_contain_text("read again")
    page.wait_for_timeout(300)
    assert len(readings) == 1


def test_the_request_can_be_repeated(page: Page, tmp_path: Path) -> None:
    """The command line that is shown, run by a shell beside the saved image, makes the same picture."""
    give(page, 3, level=102)
    move(page, 5, 0.2)
    expect(page.locator("#tweaked-caption")).to_contain_text("0.60")
    repeat(page, tmp_path)


def repeat(page: Page, place: Path) -> None:
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Save what the network saw").click()
    downloading.value.save_as(place / "image.png")
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Save the bent picture").click()
    assert downloading.value.path().read_bytes() == source(page, "tweaked")
    command = page.locator("#curl").text_content()
    assert command
    subprocess.run(["bash", "-c", command], cwd=place, check=True, capture_output=True)  # noqa: S603, S607
    assert (place / "tweaked.png").read_bytes() == source(page, "tweaked")


def test_a_class_may_have_any_name(opened: Opened, tmp_path: Path) -> None:
    """Quotes, markup and what curl reads as its own are text, in the page and in the command line.

    The images of this model show two classes, and both are named.
    """
    label = 'it\'s <b>$HOME</b> "3"; type=text/html' + "long" * 20

    def change(manifest: dict[str, Any]) -> None:
        manifest["classes"][3] = label
        manifest["labels_per_image"] = 2
        manifest["measured"] |= {"test_images": 400, "test_mistakes": 3}

    assert label in read_manifest(other_model(tmp_path / "models", change)).classes
    with served(tmp_path / "models") as process:
        page = opened(f"http://127.0.0.1:{process.port}")
        page.locator("#file").set_input_files(file_of(3, 102))
        expect(page.locator("#verdict")).to_have_text(f"This is “{label}” and “0”.")
        expect(page.locator("#tweaked-caption")).to_contain_text("0.40")
        expect(page.locator("#model-facts")).to_contain_text("0.75 % test error")
        repeat(page, tmp_path)
        heights = page.locator("#classes .length").evaluate_all("all => all.map((each) => each.offsetHeight)")
        assert len(set(heights)) == 1, "a number is on one line"
        page.set_viewport_size({"width": 320, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_the_sweep_is_saved_as_a_figure(page: Page, service: str, tmp_path: Path) -> None:
    """It is the labelled grid of /reconstruct/sweep."""
    give(page, 3, level=102)
    move(page, 2, 0.1)
    with page.expect_download() as downloading:
        page.get_by_role("button", name="Save the sweep as a figure").click()
    assert downloading.value.suggested_filename == "sweep-3.png"
    downloading.value.save_as(tmp_path / "sweep.png")
    image = data_url(encode(image_of(3, 102)))
    figure = httpx2.post(
        f"{service}/reconstruct/sweep",
        json={"image": image, "tweaks": [{"dimension": 2, "delta": 0.1}]},
        headers={"accept": "image/png"},
    )
    assert (tmp_path / "sweep.png").read_bytes() == figure.content


def test_a_file_that_is_no_picture_is_refused(page: Page) -> None:
    """The page says so, keeps what it had, and forgets the complaint at the next picture."""
    give(page, 3)
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b""})
    expect(page.get_by_role("alert")).to_have_text(re.compile("^This browser cannot open “a.png”[^:]*$"))
    expect(page.locator("#verdict")).to_have_text("This is “3”.")
    move(page, 5, -0.2)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_refusal_says_what_is_expected(opened: Opened, tiny_models: Path) -> None:
    """What the service says against a picture stands in the page."""
    with served(tiny_models, max_pixels="800") as process:
        page = opened(f"http://127.0.0.1:{process.port}")
        alert = page.get_by_role("alert")  # the example has more pixels
        expect(alert).to_contain_text("Received: 280x280")
        expect(alert).to_contain_text("Expected: at most 800 pixels")


def test_a_service_that_stopped_is_said(opened: Opened, tiny_models: Path) -> None:
    """Nobody looks at a page that does nothing and says nothing."""
    with served(tiny_models) as process:
        page = opened(f"http://127.0.0.1:{process.port}")
        give(page, 3)
        process.process.kill()
        process.process.wait()
        page.route("**/*", lambda route: route.abort())
        move(page, 5, 0.2)
        expect(page.get_by_role("alert")).to_contain_text("does not answer")


def test_a_key_is_asked_for(opened: Opened, tiny_models: Path) -> None:
    """Where the service wants a key the page asks for it, and keeps it for the tab alone."""
    with served(tiny_models, api_keys=KEY) as process:
        page = opened(f"http://127.0.0.1:{process.port}")
        page.get_by_label("asks for an API key").fill("not the right key – at all")
        page.get_by_role("button", name="Use it").click()
        expect(page.get_by_role("alert")).to_contain_text("This needs an API key")
        page.get_by_label("asks for an API key").fill(KEY)
        page.get_by_role("button", name="Use it").click()
        expect(page.get_by_label("asks for an API key")).to_be_hidden()
        give(page, 3)
        expect(page.locator("#curl")).to_contain_text("X-API-Key: YOUR-KEY")
        page.reload()
        give(page, 4)
        page.route("**/reconstruct?*", lambda route: route.fulfill(status=401, json={"detail": "No longer."}))
        move(page, 5, -0.2)
        expect(page.get_by_label("asks for an API key")).to_be_focused()
        page.unroute("**/reconstruct?*")
        page.get_by_label("asks for an API key").fill(KEY)
        page.get_by_role("button", name="Use it").click()
        expect(page.get_by_label("asks for an API key")).to_be_hidden()
        expect(page.locator("#tweaked-caption")).to_contain_text("“4”, as it is: read again")
        assert page.evaluate("localStorage.length") == 0


def test_the_page_may_lie_below_a_prefix(page: Page, service: str) -> None:
    """Behind a proxy that serves it at /capsnet/ everything comes from there."""
    prefix = f"{service}/capsnet/"

    def proxy(route: Route) -> None:
        route.fulfill(response=route.fetch(url=route.request.url.replace(prefix, f"{service}/")))

    expect(page.locator(".strip").first).to_be_visible()
    expect(page.locator("#tweaked-caption")).to_contain_text("read again")
    page.route(f"{prefix}**", proxy)
    asked = asked_for(page, "")
    page.goto(prefix)
    give(page, 3)
    move(page, 5, -0.2)
    expect(page.locator("#tweaked-caption")).to_contain_text("bent: read again")
    expect(page.locator("#curl")).to_contain_text(f"{prefix}reconstruct")
    assert [url for url in asked if not url.startswith((prefix, "data:"))] == []
    page.unroute_all(behavior="wait")  # or answers would be sent on after the end


def test_what_the_docs_try_goes_below_a_prefix(opened: Opened, service: str) -> None:
    """Swagger UI asks where its document came from, and each body that it offers is answered."""
    prefix = f"{service}/capsnet/"
    page = opened(f"{service}/livez")
    page.route(
        f"{prefix}**",
        lambda route: route.fulfill(
            response=route.fetch(url=route.request.url.replace(prefix, f"{service}/"))
        ),
    )
    page.goto(f"{prefix}docs")
    for path in ("/livez", "/predict", "/reconstruct", "/reconstruct/sweep"):
        operation = page.locator(f'.opblock:has([data-path="{path}"])')
        operation.locator(".opblock-summary-control").click()
        operation.get_by_role("button", name="Try it out").click()
        if path != "/livez":
            operation.locator(
                ".body-param-content-type select, .opblock-section-request-body select"
            ).first.select_option("application/json")
        operation.get_by_role("button", name="Execute").click()
        expect(operation.locator(".request-url")).to_contain_text(f"{prefix}{path[1:]}")
        expect(operation.locator(".live-responses-table .response-col_status").last).to_have_text("200")
    page.unroute_all(behavior="wait")  # or answers would be sent on after the end


def test_the_request_is_copied(page: Page) -> None:
    """To the clipboard; where a browser gives none, without TLS, it is selected. The page says which."""
    give(page, 3)
    command = page.locator("#curl").text_content()
    copy = page.get_by_role("button", name="Copy the request")
    # A clipboard of its own: the real one depends on which window has the focus.
    put = "Object.defineProperty(navigator, 'clipboard', { configurable: true, value: %s })"
    page.evaluate(put % "{ writeText: async (text) => { window.copied = text; } }")
    copy.click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    expect(page.locator("#curl")).to_have_text(page.evaluate("window.copied"), use_inner_text=True)
    page.evaluate(put % "undefined")
    copy.click()
    expect(page.locator("#copied")).to_have_text("Selected, for you to copy.")
    assert page.evaluate("getSelection().toString()") == command
    move(page, 5, -0.2)
    expect(page.locator("#copied")).to_have_text("")


def test_dark_ink_on_light_ground(opened: Opened, tmp_path: Path) -> None:
    """The pad has the polarity of the training images."""
    other_model(tmp_path / "models", lambda manifest: manifest["image"].update(polarity="dark_on_light"))
    with served(tmp_path / "models") as process:
        page = opened(f"http://127.0.0.1:{process.port}")
        expect(page.locator("#verdict")).to_contain_text("This is")
        corner = """[...document.getElementById("pad").getContext("2d").getImageData(0, 0, 1, 1).data]"""
        assert page.evaluate(corner) == [255, 255, 255, 255]


def test_every_example_is_read_as_what_it_is(opened: Opened) -> None:
    """The network that comes with the service recognises all ten, and finds none unusual."""
    with served(ROOT / "models", default_model="mnist") as process:
        page = opened(f"http://127.0.0.1:{process.port}")
        for digit in range(10):
            page.get_by_role("button", name=f"Example {digit}").click()
            expect(page.locator("#verdict")).to_have_text(f"This is “{digit}”.")
            expect(page.locator("#tweaked-caption")).to_contain_text(f"read again as “{digit}”")


def test_a_low_screen_shows_the_slider_that_has_the_focus(opened: Opened, service: str) -> None:
    """Neither there nor on a tall one do the pictures cover it."""
    for height in (320, 800):
        page = opened(service, viewport={"width": 640, "height": height})
        give(page, 3)
        page.locator("#dimension-15").focus()
        page.locator("#dimension-4").focus()
        at_its_middle = """(slider) => {
            const box = slider.getBoundingClientRect();
            return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === slider;
        }"""
        assert page.locator("#dimension-4").evaluate(at_its_middle)


@pytest.mark.parametrize(("width", "height"), [(390, 500), (820, 1180), (1280, 700)])
@pytest.mark.parametrize("failing", [False, True], ids=["well", "complaining"])
def test_nothing_hides_what_has_the_focus(
    opened: Opened, service: str, width: int, height: int, failing: bool
) -> None:
    """Whoever goes backwards by keyboard sees what they are at, beside the pictures and a complaint."""
    page = opened(service, viewport={"width": width, "height": height})
    give(page, 3)
    if failing:
        page.route("**/predict?*", lambda route: route.fulfill(status=500, json={"detail": "Broken. " * 20}))
        move(page, 5, 0.2)
        expect(page.get_by_role("alert")).to_be_visible()
    hidden = """() => {
        const { x, y, width, height } = document.activeElement.getBoundingClientRect();
        const top = document.elementFromPoint(x + width / 2, y + height / 2);
        const at = document.activeElement;
        return top === null || !(at.contains(top) || top.contains(at));
    }"""
    page.locator("#curl").focus()
    sliders = [f"dimension-{dimension}" for dimension in reversed(range(DIMENSIONS))]
    for name in ("copy", "figure", "save-seen", "save", *sliders, "reset"):
        page.keyboard.press("Shift+Tab")
        expect(page.locator(f"#{name}")).to_be_focused()
        assert not page.evaluate(hidden), name
    page.locator("#file").focus()
    for name in ("clear", "undo"):
        page.keyboard.press("Shift+Tab")
        expect(page.locator(f"#{name}")).to_be_focused()
        assert not page.evaluate(hidden), name


@pytest.mark.parametrize("width", [320, 768, 820, 1280])
def test_a_caption_stands_under_its_picture(opened: Opened, service: str, width: int) -> None:
    """The three pictures fill their width, beside one another, at every width of the window."""
    page = opened(service, viewport={"width": width, "height": 900})
    give(page, 3)
    boxes = page.locator("figure").evaluate_all(
        """all => all.map((figure) => {
            const [image, caption] = [...figure.children].map((each) => each.getBoundingClientRect());
            return [image.x, image.width, caption.x, image.height, image.y];
        })"""
    )
    for x, wide, caption, high, y in boxes:
        assert x == caption
        assert wide == pytest.approx(high, abs=1)
        assert y == boxes[0][4]


def test_nothing_moves_under_the_pointer(page: Page) -> None:
    """A slider stays where it is while its strip is drawn, its value changes and the service refuses."""
    give(page, 3)
    place = "(slider) => slider.getBoundingClientRect().y + scrollY"
    slider = page.locator("#dimension-6")
    expect(page.locator(".strip").first).to_be_visible()
    drawn = slider.evaluate(place)
    page.locator(".strip").evaluate_all("all => all.forEach((strip) => strip.replaceChildren())")
    assert slider.evaluate(place) == pytest.approx(drawn, abs=1)
    value = page.locator(".dimension .value").nth(6)
    width = "(value) => value.offsetWidth"
    unmoved = value.evaluate(width)
    move(page, 6, -0.25)
    assert value.evaluate(width) == unmoved
    expect(page.locator("#tweaked-caption")).to_contain_text("bent: read again")
    gate = Gate(page, "**/reconstruct?*")
    page.evaluate(
        """() => {
            const problem = document.getElementById("problem");
            window.seen = [];
            const changed = () => {
                if (window.seen.at(-1) !== problem.hidden) window.seen.push(problem.hidden);
            };
            new MutationObserver(changed).observe(problem, { attributeFilter: ["hidden"] });
        }"""
    )
    for count, value_of in enumerate((0.05, 0.1, 0.15, 0.2), 1):
        move(page, 6, value_of)
        gate.wait_for(count)
        gate.refuse()
        expect(page.get_by_role("alert")).to_be_visible()
    assert page.evaluate("window.seen") in ([False], [True, False])  # hidden before the first, not since
    gate.open()
    move(page, 6, 0.25)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_finger_that_scrolls_bends_nothing(opened: Opened, service: str) -> None:
    """On a telephone sliders lie in the way of every swipe, and are left as they were."""
    page = opened(service, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    give(page, 3)
    move(page, 8, 0.1)
    slider = page.locator("#dimension-8")
    slider.evaluate("(slider) => slider.scrollIntoView({ block: 'center' })")
    box = slider.bounding_box()
    assert box
    before = page.evaluate("scrollY")
    x, y = box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for step in range(1, 20):
        at = {"x": x, "y": y - 8 * step}
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [at]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_function("(before) => scrollY > before", arg=before)
    expect(slider).to_have_value("0.1")
    expect(page.locator(".dimension .value").nth(8)).to_have_text("+0.10")


def test_a_reading_is_of_the_picture_above_it(page: Page) -> None:
    """While a bent picture is not read again yet, nobody is told what the one before it was read as."""
    give(page, 3, level=102)
    caption = page.locator("#tweaked-caption")
    expect(caption).to_contain_text("read again as “3”, 0.40")
    gate = Gate(page, "**/predict?*preprocess=none*")
    move(page, 5, 0.2)
    gate.wait_for(1)
    expect(caption).to_have_text("“3”, bent")
    gate.open()
    expect(caption).to_have_text("“3”, bent: read again as “3”, 0.60")


def test_the_focus_is_given_back_to_nobody_who_went_on(page: Page) -> None:
    """Whoever does something else while a picture is read finds the slider where they had left it."""
    give(page, 3)
    page.locator("#dimension-4").focus()
    gate = Gate(page, "**/predict?*image=true*")
    page.locator("#file").set_input_files(file_of(6))
    gate.wait_for(1)
    page.get_by_role("heading", name="Draw").click()
    gate.open()
    expect(page.locator("#verdict")).to_have_text("This is “6”.")
    expect(page.locator("#tweaked-caption")).to_contain_text("read again")
    assert page.evaluate("document.activeElement.id") == ""


@pytest.mark.parametrize("what", ["predict", "models"])
def test_what_failed_can_be_tried_again(opened: Opened, service: str, what: str) -> None:
    """A service that was away for a moment costs nobody the drawing; what it refuses is not asked again."""
    page = opened(service)
    give(page, 3)
    pattern = f"**/{what}*"
    page.route(pattern, lambda route: route.fulfill(status=500, json={"detail": "Broken."}))
    if what == "models":
        page.reload()
    else:
        page.locator("#file").set_input_files(file_of(6))
    again = page.get_by_role("alert").get_by_role("button", name="Try again")
    again.focus()
    with page.expect_response(pattern):
        page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    expect(again).to_be_focused()  # it failed again
    page.unroute(pattern)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#verdict")).to_contain_text("This is")
    page.route("**/predict*", lambda route: route.fulfill(status=422, json={"detail": "No picture."}))
    page.locator("#file").set_input_files(file_of(7))
    expect(page.get_by_role("alert")).to_contain_text("No picture.")
    expect(again).to_have_count(0)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_screen_scrolls_sideways(opened: Opened, service: str, width: int) -> None:
    """From a small telephone to a desk everything is within the width."""
    page = opened(service, viewport={"width": width, "height": 800})
    give(page, 3)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_model_may_have_a_long_name(opened: Opened, tmp_path: Path) -> None:
    """It makes no telephone scroll sideways, where it is one of several."""
    for name in ("tiny", "letters-of-some-alphabet-as-they-are-printed"):
        write_tiny_model(tmp_path / "models", name)
    with served(tmp_path / "models", default_model="tiny") as process:
        page = opened(f"http://127.0.0.1:{process.port}", viewport={"width": 320, "height": 800})
        give(page, 3)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_swagger_ui_shows_every_route(opened: Opened, service: str) -> None:
    """/docs works in a browser under the same policy."""
    page = opened(f"{service}/docs")
    for path in ("/predict", "/reconstruct", "/reconstruct/sweep"):
        expect(page.locator(f'[data-path="{path}"]')).to_have_count(1)


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(page: Page, how: str) -> None:
    """A picture comes by clipboard or mouse as it does by file, and takes the focus from nobody."""
    give(page, 3)
    page.locator("#dimension-4").focus()
    if how == "drop":  # a page that does not say so gets no files
        over = 'document.body.dispatchEvent(new DragEvent("dragover", { bubbles: true, cancelable: true }))'
        assert page.evaluate(over) is False
    page.evaluate(
        """([how, text]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "image.png", { type: "image/png" }));
            const event = how === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""",
        [how, base64_text(encode(image_of(6)))],
    )
    expect(page.locator("#verdict")).to_have_text("This is “6”.")
    expect(page.locator("#dimension-4")).to_be_focused()

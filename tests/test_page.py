"""The page in real Chromium, against a real server of a tiny model."""

import json
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

from treadle.common.params import RoutingParams
from treadle.engine.runners.runner import Runner

from conftest import BASE
from failing import FailingSteps
from serving import Serving, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

PROMPT = "add three plus four"
NAMES = ["math", "science", "code"]
LONG = "sampling.max_tokens=450"


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder) as each:
        yield each


@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as launched:
            yield launched


@pytest.fixture
def visit(browser: Browser, served: Serving) -> Generator[Callable[..., Page]]:
    """Open the page in a browser that has never been there; scripts may not fail, and all requests go to the server."""
    contexts: list[Any] = []
    problems: list[str] = []

    def check_request(request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:")):
            problems.append(request.url)

    def open_page(fragment: str = "", url: str = "", is_open: bool = True, kind: str = "text", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", check_request)
        page.goto(url or f"{served.url}/#kind={kind}&{fragment}")
        if is_open:
            page.locator("#adapter-list li").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@contextmanager
def asked(page: Page) -> Generator[list[dict[str, Any]]]:
    """Collect the bodies of the requests to generate that the page sends in the block."""
    bodies: list[dict[str, Any]] = []

    def collect(request: Request) -> None:
        if "completions" in request.url:
            bodies.append(json.loads(request.post_data or ""))

    page.on("request", collect)
    yield bodies
    page.remove_listener("request", collect)


def generate(page: Page, prompt: str | None = PROMPT) -> None:
    """Type a prompt, press the button and wait for the end."""
    if prompt is not None:
        page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()
    page.locator("#send:enabled").wait_for()


def text_of(page: Page, column: int = 0) -> str:
    """Return a column's text, the prompt too where it is folded."""
    return "".join(page.locator(".column").nth(column).locator(".token").all_text_contents())


def colours_of(page: Page) -> list[str]:
    return page.locator(".token").evaluate_all("all => all.map(each => getComputedStyle(each).backgroundColor)")


def rows_of_inspector(page: Page) -> dict[str, list[float]]:
    """Return the numbers that stand beside a token, by adapter."""
    rows = page.locator("#inspector tbody tr").all_inner_texts()
    cells = [re.split(r"\s+", row.replace("\N{MINUS SIGN}", "-").strip()) for row in rows]
    return {name: [float(number) for number in numbers] for name, *numbers in cells}


@pytest.fixture
def trace(served: Serving) -> dict[str, Any]:
    """What the server itself says of the prompt's routed answer."""
    body = {"model": "auto", "prompt": PROMPT, "echo": True, "max_tokens": 16, "temperature": 0}
    choice = served.post("/v1/completions", {**body, "treadle": {"trace": True}}).json()["choices"][0]
    return {"text": choice["text"], **choice["treadle"]}


def test_type_stream_and_hover(visit: Any, served: Serving, trace: dict[str, Any]) -> None:
    page = visit("sampling.max_tokens=16")
    page.get_by_label("Prompt", exact=True).press_sequentially(PROMPT)
    with served.paused():
        page.keyboard.press("Control+Enter")
        expect(page.get_by_role("status")).to_have_text("Generating …")
        expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    expect(page.get_by_role("status")).to_have_text("Done: 16 and 16 tokens.")
    page.locator(".column summary").first.click()
    tokens = page.locator(".column").first.locator(".token")
    assert tokens.all_text_contents() == trace["tokens"]
    assert len(set(colours_of(page))) > 2, "tokens of different blends have different colours"
    written = [index for index, text in enumerate(trace["tokens"]) if text.strip()]  # not in the middle of a character
    for index in (3, written[-1]):
        tokens.nth(index).hover()
        expect(page.locator("#inspector")).to_contain_text(f"token {index + 1}")
        rows = rows_of_inspector(page)
        assert rows.pop("base") == pytest.approx([1 - sum(trace["weights"][index])], abs=6e-3)
        assert list(rows) == NAMES
        for place, numbers in enumerate(rows.values()):
            given = [trace[field][index][place] for field in ("weights", "cosines", "scores")]
            assert numbers == pytest.approx(given, abs=6e-3)
    page.mouse.move(0, 0)
    expect(page.locator("#inspector")).to_be_hidden()


def test_tokens_arrive_while_the_answer_is_made(visit: Any, served: Serving) -> None:
    page = visit(LONG)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    with served.slowed():
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".column").first.locator(".token:not(.read)").nth(3)).to_be_attached()
        expect(page.get_by_role("status")).to_have_text("Generating …")
        expect(page.locator(".text").first).to_have_attribute("aria-busy", "true")
        stop = page.get_by_role("button", name="Stop")
        expect(stop).to_be_focused()  # not lost with the button that can no longer be pressed
        stop.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("Stopped after")
        expect(page.get_by_role("button", name="Generate")).to_be_focused()
    served.wait_until_idle()
    generated = page.locator(".column").first.locator(".token:not(.read)").count()
    assert 3 < generated < 400
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT


def test_the_keyboard_reaches_every_token(visit: Any) -> None:
    page = visit("other=&sampling.max_tokens=8")
    generate(page)
    page.locator("#prompt").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.token')"):
            break
    expect(page.locator("#inspector")).to_contain_text("answer, token 20")
    for key, place in (("ArrowLeft", 19), ("ArrowLeft", 18), ("ArrowRight", 19), ("End", 27), ("Home", 1)):
        page.keyboard.press(key)
        expect(page.locator("#inspector")).to_contain_text(f"token {place}")
    focused = page.locator(".token:focus")
    assert focused.get_attribute("aria-describedby") == "inspector"
    assert focused.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"
    assert list(rows_of_inspector(page)) == [*NAMES, "base"]
    page.keyboard.press("Escape")
    expect(page.locator("#inspector")).to_be_hidden()
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.matches('.token')"), "one stop for all tokens"


def test_pointing_at_the_chart_finds_the_token(visit: Any) -> None:
    page = visit("other=&sampling.max_tokens=8")
    generate(page)
    canvas = page.get_by_role("img", name=re.compile("Weights of the adapters over 27 tokens. Mean over the answer: "))
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 0.7, "y": 60})
    expect(page.locator(".token.picked")).to_have_count(1)
    index = int(page.locator(".token.picked").get_attribute("data-index"))
    assert 10 < index < 25
    expect(page.locator("#inspector")).to_contain_text(f"token {index + 1}")


CHART = """() => Chart.getChart(document.querySelector(".column canvas")).data.datasets.map(
  ({ label, data, borderColor }) => [label, borderColor, data])"""


def test_the_chart_shows_the_bases_share(visit: Any, trace: dict[str, Any]) -> None:
    page = visit("other=&sampling.max_tokens=16")
    generate(page)
    names, colours, shares = zip(*page.evaluate(CHART), strict=True)
    assert names == (*NAMES, "base")
    assert len(set(colours)) == len(names)
    base = [1 - sum(weights) for weights in trace["weights"]]
    assert max(base) > 0.01
    assert shares[-1] == pytest.approx(base, abs=1e-4)
    assert [list(each) for each in zip(*shares[:-1], strict=True)] == trace["weights"]


@pytest.mark.parametrize(("weight", "share", "line"), [(0.4, 60, "none"), (0.6, 40, "solid")])
def test_a_token_has_no_line_where_the_base_leads(visit: Any, weight: float, share: int, line: str) -> None:
    page = visit(f"arm=fixed&fixed.math={weight}&fixed.science=0&fixed.code=0&other=&sampling.max_tokens=4")
    generate(page)
    lines = page.locator(".token").evaluate_all("all => all.map(each => getComputedStyle(each).borderBottomStyle)")
    assert set(lines) == {line}
    legend = page.locator(".legend li").all_inner_texts()
    leads = f"The base leads {4 if line == 'none' else 0} of 4 tokens."
    assert legend == ["Mean over the answer:", f"math {100 - share} %", f"base {share} %", leads]
    expect(page.locator(".chart")).to_be_hidden()  # the weights do not change
    page.locator(".token").last.hover()
    assert rows_of_inspector(page)["base"] == [share / 100]


def test_an_adapter_switched_off_takes_no_part(visit: Any, served: Serving) -> None:
    page = visit("other=&sampling.max_tokens=8")
    page.get_by_role("checkbox", name="science").uncheck()
    expect(page.get_by_role("checkbox", name="science")).to_be_focused()
    with asked(page) as bodies:
        generate(page)
    assert bodies[0]["treadle"]["adapters"] == ["math", "code"]
    page.locator(".token").last.hover()
    assert list(rows_of_inspector(page)) == ["math", "code", "base"]
    expected = served.post(
        "/v1/completions",
        {"model": "auto", "prompt": PROMPT, "echo": True, "max_tokens": 8, "temperature": 0,
         "treadle": {"adapters": ["math", "code"]}},
    )  # fmt: skip
    assert text_of(page) == expected.json()["choices"][0]["text"]
    page.get_by_role("checkbox", name="math").uncheck()
    page.get_by_role("checkbox", name="code").uncheck()
    expect(page.locator("#adapters-hint")).to_have_text("None takes part: the base model answers alone.")
    generate(page)
    expect(page.locator(".legend")).to_have_text("No adapter acts.")
    page.locator(".token").last.hover()
    expect(page.locator("#inspector")).to_contain_text("the base model")


def test_every_arm_asks_for_what_it_says(visit: Any) -> None:
    page = visit("other=&sampling.max_tokens=2&routing.every=3")
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "Token-level routing": ("auto", {"every": 3}),
        "Prompt-level routing": ("auto", {"every": None, "prefill": "prompt"}),
        "Fixed weights": ("auto", {"fixed": {"math": 0.333, "science": 0.5, "code": 0.333}}),
        "code alone": ("code", {}),
        "Base model": ("base", {}),
    }
    for label, (model, options) in wanted.items():
        page.get_by_label("Answer by").select_option(label=label)
        if label == "Fixed weights":
            page.get_by_label("weight of science").fill("0.5")
            page.get_by_label("weight of science").press("Tab")
        with asked(page) as bodies:
            generate(page)
        expect(page.locator(".column h2")).to_have_text(label)
        expect(page.get_by_role("status")).to_have_text("Done: 2 tokens.")
        assert (bodies[0]["model"], bodies[0]["treadle"]) == (model, {**options, "trace": True})
    page.locator(".token").last.hover()
    expect(page.locator("#inspector")).to_contain_text("No adapter acts")
    assert set(colours_of(page)) == {"oklab(0 0 0 / 0)"}, "nothing is coloured"


def test_two_arms_answer_side_by_side(visit: Any, served: Serving) -> None:
    page = visit("sampling.max_tokens=8")
    page.get_by_label("Compare with").select_option(label="math alone")
    generate(page)
    assert page.locator(".column h2").all_inner_texts() == ["Token-level routing", "math alone"]
    boxes = [page.locator(".column").nth(place).bounding_box() for place in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    page.locator("#routing summary").click()
    assert page.locator(".column").first.bounding_box() == boxes[0], "long options leave the answers where they are"
    body = {"prompt": PROMPT, "echo": True, "max_tokens": 8, "temperature": 0}
    for place, model in enumerate(("auto", "math")):
        expected = served.post("/v1/completions", {"model": model, **body}).json()["choices"][0]["text"]
        assert text_of(page, place) == expected


def test_a_chat_is_sent_as_a_message_unless_a_person_says_otherwise(visit: Any, served: Serving) -> None:
    page = visit(url=f"{served.url}/#other=&sampling.max_tokens=4")
    with asked(page) as bodies:
        generate(page)
    assert bodies[0]["messages"] == [{"role": "user", "content": PROMPT}]
    assert "echo" not in bodies[0]
    expect(page.locator(".token")).to_have_count(4)
    page.locator("#sampling summary").click()
    page.get_by_label("Send as").select_option(label="text to continue")
    with asked(page) as bodies:
        generate(page)
    assert bodies[0]["prompt"] == PROMPT


def test_a_base_without_a_chat_template_is_sent_texts(visit: Any, served: Serving) -> None:
    tokenizer = served.engine.tokenizer
    own, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        page = visit("other=&sampling.max_tokens=2", kind="chat")
        with asked(page) as bodies:
            generate(page)
    finally:
        tokenizer.chat_template = own
    assert bodies[0]["prompt"] == PROMPT
    expect(page.get_by_label("Send as")).to_have_value("text")


def test_adapters_without_samples_answer_by_name(
    visit: Any, bundle_folder: Path, adapter_folders: dict[str, Path]
) -> None:
    base, adapters = str(bundle_folder.parent / BASE), str(adapter_folders["math"].parent)
    with serving(None, base=base, adapters=adapters) as unrouted:
        page = visit(url=f"{unrouted.url}/#arm=one:math&other=&sampling.max_tokens=4")
        expect(page.locator("#problem")).to_contain_text("nothing can be routed: choose an adapter by its name")
        generate(page)
        expect(page.get_by_role("status")).to_have_text("Done: 4 tokens.")


def test_on_a_phone_the_answer_is_what_one_sees(visit: Any, served: Serving) -> None:
    page = visit("sampling.max_tokens=24", viewport={"width": 390, "height": 844})
    page.get_by_label("Prompt", exact=True).fill(PROMPT + "\n" * 20)
    with served.paused():
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".column").first).to_be_in_viewport()
        assert page.locator(".column").first.bounding_box()["y"] < 40
        expect(page.get_by_role("button", name="Stop")).to_be_in_viewport()
    page.locator("#send:enabled").wait_for()
    assert page.locator(".column").first.bounding_box()["y"] < 40
    expect(page.locator(".column summary").first).to_have_text(re.compile("Prompt · 39 tokens"))
    expect(page.locator(".token.read").first).to_be_hidden()
    expect(page.locator(".token:not(.read)").first).to_be_in_viewport()
    page.locator(".column summary").first.click()
    expect(page.locator(".token.read").first).to_be_visible()


def test_waiting_for_the_first_token_is_said(visit: Any, served: Serving) -> None:
    page = visit("other=&sampling.max_tokens=4")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    with served.paused():
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".meta")).to_have_text(re.compile(r"waiting for the first token · 0\.[4-9] s"))
    expect(page.locator(".meta")).to_have_text(re.compile(r"4 tokens · [\d.]+ s · cut: max tokens"))


def test_the_address_holds_everything_but_the_key(visit: Any, served: Serving) -> None:
    page = visit()
    page.get_by_label("Prompt", exact=True).fill("two\nlines & <more>")
    page.get_by_label("Answer by").select_option(label="Fixed weights")
    page.get_by_label("Compare with").select_option(label="code alone")
    page.get_by_label("weight of math").fill("0.25")
    page.get_by_role("checkbox", name="science").uncheck()
    page.locator("#routing summary").click()
    page.get_by_label("every", exact=True).fill("5")
    page.get_by_label("combine", exact=True).select_option("sum")
    page.locator("#sampling summary").click()
    page.get_by_label("seed", exact=True).fill("7")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("status")).to_contain_text("and no key")
    other = visit(url=page.url)
    expect(other.get_by_label("weight of math")).to_have_value("0.25")
    expect(other.get_by_label("Prompt", exact=True)).to_have_value("two\nlines & <more>")
    expect(other.get_by_label("Answer by")).to_have_value("fixed")
    expect(other.get_by_label("Compare with")).to_have_value("one:code")
    expect(other.get_by_role("checkbox", name="science")).not_to_be_checked()
    for label, value in {"every": "5", "combine": "sum", "seed": "7"}.items():
        expect(other.get_by_label(label, exact=True)).to_have_value(value)
    expect(other.locator("#routing summary")).to_contain_text("2 changed")
    other.get_by_role("button", name="Reset options").click()
    expect(other.get_by_label("every", exact=True)).to_have_value("")
    expect(other.get_by_label("Prompt", exact=True)).to_have_value("two\nlines & <more>")


def test_a_link_to_what_is_not_there_says_so(visit: Any) -> None:
    page = visit("arm=one:poetry&off=prose&prompt=add&routing.rul=x&sampling.beams=3", kind="song")
    status = page.get_by_role("status")
    expect(status).to_have_text("Not on this server: prose, one:poetry, routing.rul, sampling.beams, kind song.")
    expect(page.get_by_label("Send as")).to_have_value("chat")
    expect(page.get_by_label("Answer by")).to_have_value("auto")


def test_the_key_is_asked_for_and_stays_in_the_tab(visit: Any, bundle_folder: Path) -> None:
    with serving(bundle_folder, api_key=("secret",)) as guarded:
        page = visit(url=f"{guarded.url}/#other=&sampling.max_tokens=4&prompt=add", is_open=False)
        dialog = page.get_by_role("dialog", name="This server asks for an API key")
        expect(dialog).to_be_visible()
        assert "math" not in page.content()
        dialog.get_by_role("button", name="Go on without a key").click()
        expect(page.locator("#problem")).to_contain_text("answers only with a key that it knows")
        page.get_by_role("button", name="API key").click()
        dialog.get_by_label("API key").fill("no spaces, please")
        dialog.get_by_role("button", name="Use this key").click()
        expect(dialog.get_by_role("alert")).to_contain_text("no spaces")
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        expect(dialog.get_by_role("alert")).to_have_text("The server does not know this key.")
        dialog.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("checkbox", name="math")).to_be_visible()
        generate(page, None)
        expect(page.get_by_role("status")).to_have_text("Done: 4 tokens.")
        page.get_by_role("button", name="Copy link").click()
        kept = page.evaluate("[localStorage, sessionStorage, document.cookie, location.href].map(JSON.stringify)")
        assert [place for place, text in enumerate(kept) if "secret" in text] == [1]
        page.get_by_role("button", name="API key").click()
        dialog.get_by_role("button", name="Keep the key in use").click()
        page.evaluate("sessionStorage.setItem('treadle-key', 'old')")  # the server's key has changed
        page.get_by_role("button", name="Generate").click()
        dialog.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Done: 4 tokens.")


def test_the_servers_refusal_is_shown_and_the_prompt_stays(visit: Any) -> None:
    page = visit("other=&routing.every=often&sampling.temperature=9")
    generate(page)
    expect(page.locator(".column").get_by_role("alert")).to_have_text("The server refuses this: see the marked fields.")
    every, temperature = page.get_by_label("every", exact=True), page.get_by_label("temperature", exact=True).last
    expect(page.locator("#routing-every-problem")).to_have_text(
        "got 'often'; allowed: a whole number of at least 1, or null"
    )
    expect(page.locator("#sampling-temperature-problem")).to_contain_text("got 9; allowed: 0 (greedy)")
    expect(every).to_be_focused()
    expect(every).to_be_in_viewport()
    expect(every).to_have_accessible_description(re.compile("got 'often'"))
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT
    every.fill("")
    expect(page.locator("#routing-every-problem")).to_be_hidden()
    temperature.fill("0")
    page.get_by_label("max tokens", exact=True).fill("4")
    generate(page, None)
    expect(page.get_by_role("status")).to_have_text("Done: 4 tokens.")


def test_a_prompt_that_is_too_long_is_said_at_the_prompt(visit: Any) -> None:
    for kind in ("text", "chat"):
        page = visit(kind=kind)
        generate(page, "long " * 300)
        expect(page.locator("#prompt-problem")).to_contain_text("tokens; allowed: at most")
        expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


def test_weights_that_are_refused_are_marked_at_the_adapters(visit: Any) -> None:
    page = visit("arm=fixed&other=&fixed.math=-3&routing.combine=often")
    generate(page)
    expect(page.locator("#adapters-problem")).to_contain_text("treadle.fixed.math: got -3")
    expect(page.get_by_label("weight of math")).to_be_in_viewport()


def test_a_server_that_fails_or_is_gone_is_said(visit: Any, served: Serving) -> None:
    page = visit("other=&sampling.max_tokens=8")
    problem = page.locator(".column").get_by_role("alert")
    engine, own = served.engine, served.engine.runner
    engine.runner = Runner(engine.model, engine.blend, [FailingSteps(MemoryError("no room"))])
    try:
        generate(page, "No text before begins like this one, so its prompt is no single step.")
        expect(problem).to_contain_text("the forward pass failed")
        expect(page.locator(".token:not(.read)")).to_have_count(1)  # what had come stays
        expect(page.get_by_role("status")).to_have_text("Broken off after 1 token: see the message in red.")
    finally:
        engine.runner = own

    def busy(route: Route) -> None:
        document = {"error": {"message": "the queue is full", "type": "rate_limit_error"}}
        route.fulfill(status=429, headers={"Retry-After": "3"}, body=json.dumps(document))

    page.route("**/v1/completions", busy)
    generate(page)
    expect(problem).to_have_text("the queue is full Try again in 3 s.")
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", lambda route: route.abort())
    generate(page)
    expect(problem).to_contain_text("The server cannot be reached.")
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT


def test_a_connection_that_breaks_midway_is_said_and_what_had_come_stays(visit: Any, served: Serving) -> None:
    page = visit(f"other=&{LONG}")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    with served.slowed():
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".token:not(.read)").nth(3)).to_be_attached()
        for connection in list(served.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        problem = page.locator(".column").get_by_role("alert")
        expect(problem).to_have_text(
            "The connection to the server broke off. What had come stays, and so does your prompt."
        )
    expect(page.locator(".token:not(.read)").nth(3)).to_be_attached()
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT
    served.wait_until_idle()


def test_a_models_text_is_never_html(visit: Any) -> None:
    page = visit("other=&sampling.max_tokens=2")
    prompt = "<img src=x onerror='document.title=1'><b>bold</b><script>document.title=2</script>"
    generate(page, prompt)
    assert text_of(page).startswith(prompt)
    assert page.locator(".text *:not(span, details, summary)").count() == 0
    assert page.title() == "treadle"
    page.locator(".column summary").click()
    page.locator(".token").nth(2).hover()
    expect(page.locator("#inspector code")).to_have_text('"m"')


def test_an_empty_prompt_is_not_sent(visit: Any) -> None:
    page = visit()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#prompt-problem")).to_have_text("Write a prompt first, or take an example.")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


def test_an_example_is_taken_and_back_brings_the_prompt_back(visit: Any) -> None:
    page = visit()
    page.get_by_label("Prompt", exact=True).fill("mine")
    page.get_by_role("button", name="Arithmetic, then code").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile("farmer[\\s\\S]*Python"))
    expect(page.locator("#routing summary")).to_contain_text("3 changed")
    page.go_back()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("mine")
    expect(page.locator("#routing summary")).to_have_text("Advanced: routing ")


def test_the_routing_fields_are_the_options_of_routing(visit: Any) -> None:
    page = visit()
    page.locator("#routing summary").click()
    names = page.locator("#routing-fields input, #routing-fields select").evaluate_all(
        "all => all.map(each => each.name)"
    )
    assert names == [entry.name for entry in fields(RoutingParams) if entry.name != "fixed"]
    assert page.get_by_label("every", exact=True).get_attribute("placeholder") == "2"
    assert "bundle: lda" in page.get_by_label("score", exact=True).inner_text()


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_window_needs_no_sideways_scrolling(visit: Any, width: int) -> None:
    page = visit("sampling.max_tokens=24", viewport={"width": width, "height": 740})
    page.locator("#routing summary").click()
    page.locator("#sampling summary").click()
    page.get_by_label("Answer by").select_option(label="Fixed weights")
    generate(page, PROMPT + " " + "x" * 120)
    page.locator(".column").first.locator(".token").last.hover()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tops = [page.locator(each).first.bounding_box()["y"] for each in (".ask", ".answers", ".settings")]
    assert tops == sorted(tops)
    for selector in ("#inspector", "#send", "#theme", ".column", ".legend", "#adapter-list"):
        box = page.locator(selector).first.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width, selector


# Contrast as WCAG 2 defines it, from what Chromium computes

CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (...layers) => {  // colours over each other, as they are seen
    context.clearRect(0, 0, 1, 1);
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const bad = [];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || each.placeholder;
    if (!own || !each.checkVisibility() || each.matches(":disabled, :disabled *, option")) continue;
    const behind = [];
    for (let up = each; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
    const style = getComputedStyle(each, each.placeholder && !each.value ? "::placeholder" : null);
    const under = rgb(...behind), ink = rgb(...behind, style.color);
    const [low, high] = [light(under), light(ink)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    const what = `${each.tagName}.${each.className} ${each.textContent.slice(0, 20)}`;
    if (ratio < 4.5) bad.push(`${what}: ${ratio.toFixed(2)}`);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(visit: Any, scheme: Any) -> None:
    page = visit("sampling.max_tokens=40&routing.temperature=9", color_scheme=scheme)

    def lightness() -> int:
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))))

    assert (lightness() > 380) == (scheme == "light")
    page.locator("#routing summary").click()
    generate(page)
    page.locator(".column").first.locator(".token").last.hover()
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("button", name="Dark" if scheme == "light" else "Light").click()
    page.locator(".column").first.locator(".token").last.hover()
    assert page.evaluate(CONTRAST) == []
    assert (lightness() > 380) == (scheme == "dark")
    page.reload()
    assert (lightness() > 380) == (scheme == "dark"), "the choice is kept"


def test_every_control_has_a_name_and_a_visible_focus(visit: Any) -> None:
    page = visit("arm=fixed&sampling.max_tokens=2")
    page.locator("#routing summary").click()
    page.locator("#sampling summary").click()
    names = page.locator("button, input, select, textarea").evaluate_all(
        "all => all.map(each => each.labels?.[0]?.textContent || each.ariaLabel || each.textContent)"
    )
    assert len(names) > 30
    assert [name for name in names if not name.strip()] == []
    page.get_by_role("button", name="Copy link").focus()
    stops: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        script = "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
        tag, outline = page.evaluate(script)
        if tag == "BODY":
            break
        assert outline != "none", tag
        stops.append(tag)
    assert len(stops) > 25
    generate(page)
    assert page.get_by_role("status").get_attribute("aria-live") in (None, "polite")  # the role implies it

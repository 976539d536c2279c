"""The chat page in headless Chromium, against a scripted server: answers, failures, keyboard.

Each test opens the page as a first visit. The engine view and the looks are in
test_page_engine.py; the static rules (size, no innerHTML) in test_page_files.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode adds no test folder
from page_browser import Page, wait_until
from page_server import FakeServer

pytest_plugins = ["page_fixtures"]
pytestmark = pytest.mark.browser
ESCAPE, UP, SHIFT, ENTER = "\ue00c", "\ue013", "\ue008", "\ue007"


def test_an_answer_streams_in_and_shows_its_figures(page: Page, fake: FakeServer) -> None:
    fake.pause_s = 0.05
    page.send("why")
    first = page.wait("document.querySelector('.streaming .body').innerText")
    page.wait("!document.querySelector('.streaming')")
    answer = page.text(".message.assistant .body")
    assert answer.startswith(str(first)) and len(first) < len(answer)
    assert answer.endswith("You asked: why")
    stats = page.text(".stats")
    assert "first token" in stats and "tok/s" in stats and "prompt 52 (48 cached)" in stats
    assert page.text("#context") == "65 of 8,192 tokens"
    assert fake.bodies[-1]["stream_options"] == {"include_usage": True}
    assert fake.bodies[-1]["model"] == "smollm2-135m-instruct"


def test_markdown_renders_and_markup_stays_text(page: Page) -> None:
    page.ask("some markdown")
    body = ".message.assistant .body "
    assert page.text(body + "strong") == "arctic tern"
    assert page.text(body + "em") == "far"
    assert page.text(body + "ol > li:nth-child(2) > ul > li") == "and back"
    assert page.text(body + "pre") == (
        "def reverse(text: str) -> str:\n    return text[::-1]  # <b>not bold</b>"
    )
    assert page.text(body + "td.to-end") == "70,000"
    assert page.count(body + ":is(img, b, script)") == 0
    assert page.js("return document.title") == "Sterna"
    links = "return [...document.querySelectorAll('.body a')].map(a => [a.href, a.rel])"
    assert page.js(links) == [["https://example.org/", "noopener noreferrer nofollow"]]


# Each source renders to this HTML; awkward pieces that models write while streaming.
MARKDOWN = [
    ("a **b** `c*d*`", "<p>a <strong>b</strong> <code>c*d*</code></p>"),
    ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
    ("**open and `half", "<p>**open and `half</p>"),
    ("***x***", "<p><em><strong>x</strong></em></p>"),
    ("# T\ntext", '<h3 class="h-1">T</h3><p>text</p>'),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("- a\n- b\n\nafter", "<ul><li>a</li><li>b</li></ul><p>after</p>"),
    ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    (r"\*not em\*", "<p>*not em*</p>"),
    ("<script>x</script>&amp;", "<p>&lt;script&gt;x&lt;/script&gt;&amp;amp;</p>"),
    ("[x](JAVASCRIPT:alert)", "<p><span>x</span></p>"),
    ("[x](data:text/html,y)", "<p><span>x</span></p>"),
]


def test_markdown_pieces(page: Page) -> None:
    render = """
      const done = arguments[1];
      import("/web/js/markdown.js").then(({ MarkdownView }) => {
        const root = document.createElement("div");
        const view = new MarkdownView(root);
        for (let i = 1; i <= arguments[0].length; i += 1) view.update(arguments[0].slice(0, i));
        done(root.innerHTML);
      });"""
    for source, html in MARKDOWN:
        assert page.driver.execute_async_script(render, source) == html, source


def test_hostile_markdown_stays_fast(page: Page) -> None:
    render = """
      const done = arguments[1];
      import("/web/js/markdown.js").then(({ MarkdownView }) => {
        const started = performance.now();
        new MarkdownView(document.createElement("div")).update(arguments[0]);
        done(performance.now() - started);
      });"""
    for source in ("*a " * 4000, "[" * 8000, "`" * 8000, "> " * 4000, "**" * 6000, "|" * 8000):
        assert page.driver.execute_async_script(render, source) < 1500, source[:8]


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_came_and_the_server_notices(
    page: Page, fake: FakeServer, how: str
) -> None:
    fake.pause_s = 0.02
    page.send("a long story")
    page.wait("document.querySelector('.streaming .body').innerText.length > 40")
    if how == "button":
        page.click("#send[aria-label=Stop]")
    else:
        page.press(ESCAPE)
    page.wait("!document.querySelector('.streaming')")
    assert page.text(".message.assistant .ending") == "Stopped by you."
    assert 40 < len(page.text(".message.assistant .body")) < 3000
    page.wait("document.querySelector('#send').ariaLabel === 'Send'")
    assert wait_until(lambda: fake.cancelled == 1)


def test_a_full_server_is_asked_again_after_retry_after(page: Page, fake: FakeServer) -> None:
    fake.busy, fake.retry_after = 1, "2"
    page.send("hello")
    page.wait("!document.querySelector('#notice').hidden")
    assert page.text(".notice-text").startswith("The server is full. Asking again in ")
    assert page.text(".countdown") in ("1 s", "2 s")
    page.wait_for_answers(1)
    assert len(fake.bodies) == 2 and page.count(".message.user") == 1
    assert page.js("return document.querySelector('#notice').hidden")


def test_a_server_with_a_key_asks_for_it(page: Page, fake: FakeServer) -> None:
    fake.api_key = "secret"
    page.open(fake.url)
    page.wait("document.querySelector('#key-dialog').open")
    page.press(ESCAPE)
    assert page.wait("document.querySelector('.model-name').innerText") == "needs an API key"
    page.send("hello")
    page.wait("document.querySelector('#key-dialog').open")
    page.type("#key-input", "wrong" + ENTER)
    page.wait("document.querySelector('#key-text').innerText.includes('refused')")
    page.wait("document.querySelector('#key-dialog').open")
    page.type("#key-input", "secret" + ENTER)
    page.wait_for_answers(1)
    page.wait("document.querySelector('.dot').dataset.state === 'up'")
    assert "secret" not in page.js("return JSON.stringify(localStorage) + location.href")


# The message that provokes it, what the notice says, the action offered.
FAILURES = [
    ("too long", "Prompt has 9,000 tokens, limit 8,192; shorten it.", "Edit message"),
    ("cut me", "The connection was lost before the end.", "Try again"),
    ("break me", "This step failed.", "Try again"),
]


@pytest.mark.parametrize(("message", "says", "action"), FAILURES)
def test_a_failure_says_what_happened_and_the_way_on(
    page: Page, message: str, says: str, action: str
) -> None:
    page.send(message)
    page.wait("!document.querySelector('#notice').hidden")
    assert page.text(".notice-text") == says
    assert page.text("#notice .button") == action
    if message != "too long":
        assert page.text(".message.assistant .ending.bad") == says + " The answer is incomplete."
        assert page.text(".message.assistant .body").startswith("The sky is blue")


def test_draining_and_unreachable_servers(page: Page, fake: FakeServer) -> None:
    fake.is_draining = True
    page.send("hello")
    page.wait("document.querySelector('#notice').innerText.includes('shutting down')")
    fake.is_draining = False
    page.click("#notice .button")
    page.wait_for_answers(1)
    page.driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.send("again")
    page.wait("document.querySelector('#notice').innerText.includes('does not answer')")
    online = {**offline, "offline": False}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", online)
    page.click("#notice .button")
    page.wait_for_answers(2)


def test_regenerate_edit_and_clear(page: Page, fake: FakeServer) -> None:
    page.ask("one")
    page.ask("two")
    page.click(".message:last-child [aria-label=Regenerate]")
    page.wait("!document.querySelector('.streaming, .send.stop')")
    assert [m["content"] for m in fake.bodies[-1]["messages"] if m["role"] == "user"] == [
        "one",
        "two",
    ]
    assert page.count(".message") == 4
    page.press(UP)  # an empty box: edit the last message
    assert page.js("return document.querySelector('#prompt').value") == "two"
    page.type("#prompt", " changed")
    page.press(ENTER)
    page.wait(
        "document.querySelector('.message:last-child .body').innerText.endsWith('two changed')"
    )
    assert page.count(".message") == 4
    page.click("#clear")
    assert page.count(".message") == 0 and page.count("#hero:not([hidden])") == 1
    page.click("#notice .button")
    assert page.count(".message") == 4


def test_conversation_and_settings_survive_a_reload(page: Page, fake: FakeServer) -> None:
    page.click("#settings-toggle")
    page.type("#set-temperature", "0.5")
    page.ask("remember")
    page.open(fake.url, keep_storage=True)
    assert page.text(".message.user .body") == "remember"
    assert "tok/s" in page.text(".stats")
    assert page.js("return document.querySelector('#set-temperature').value") == "0.5"
    assert page.text("#settings-count") == "1"


def test_every_setting_reaches_the_request(page: Page, fake: FakeServer) -> None:
    page.click("#settings-toggle")
    typed = {
        "system": "Be brief.", "temperature": "0.7", "top_p": "0.9", "min_p": "0.05",
        "top_k": "40", "max_tokens": "64", "seed": "7", "presence_penalty": "0.5",
        "frequency_penalty": "-0.5", "repetition_penalty": "1.1", "stop": "END\n\\n\\n",
    }  # fmt: skip
    for name, value in typed.items():
        page.type(f"#set-{name}", value)
    page.js("""const s = document.querySelector('#set-format'); s.value = 'json_schema';
               s.dispatchEvent(new Event('change'))""")
    page.type("#set-schema", '{"type": ')
    page.send("hello")
    page.wait("document.querySelector('#notice').innerText.includes('not valid JSON')")
    assert fake.bodies == []
    page.type("#set-schema", '"object"}')
    page.click(".message.user [aria-label='Answer this']")
    page.wait_for_answers(1)
    body = fake.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    numbers = {name: float(typed[name]) for name in typed if name not in ("system", "stop")}
    assert {name: body[name] for name in numbers} == numbers
    assert body["stop"] == ["END", "\n\n"]
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    page.click(".settings-foot .button")
    page.ask("hello again")
    extra = set(fake.bodies[-1]) - {"model", "messages", "stream", "stream_options"}
    assert extra == set(), "an empty field must not be sent"


def test_out_of_range_settings_are_named(page: Page) -> None:
    page.click("#settings-toggle")
    page.type("#set-top_p", "3")
    assert page.text("#set-top_p-problem") == "Top p is 3; it has to be from 0.01 to 1."
    assert page.js("return document.querySelector('#set-top_p').ariaInvalid") == "true"


def test_keyboard(page: Page, fake: FakeServer) -> None:
    first = page.js("return document.querySelector('a[href], button, input, textarea')")
    assert first.get_attribute("class") == "skip", "the first stop of Tab"
    first.send_keys(ENTER)
    assert page.js("return document.activeElement.id") == "prompt"
    page.type("#prompt", "one" + SHIFT + ENTER + SHIFT + "two")
    assert page.js("return document.querySelector('#prompt').value") == "one\ntwo"
    assert fake.bodies == []
    page.js("document.activeElement.blur()")
    page.press("/")
    assert page.js("return document.activeElement.id") == "prompt"
    order = "return [...document.querySelectorAll('[tabindex]')].every(e => e.tabIndex < 1)"
    assert page.js(order), "the focus order is the reading order"


def test_copy_message_and_code(page: Page, fake: FakeServer) -> None:
    grant = {"origin": fake.url, "permissions": ["clipboardReadWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
    page.ask("some markdown")
    read = "navigator.clipboard.readText().then(arguments[0], (e) => arguments[0](String(e)))"
    page.click("[aria-label='Copy code']")
    page.wait("document.querySelector('.code [data-done]')")
    assert page.driver.execute_async_script(read).startswith("def reverse")
    page.click(".message.assistant .actions [aria-label='Copy message']")
    page.wait("document.querySelector('.actions [data-done]')")
    assert page.driver.execute_async_script(read).startswith("### Terns")


def test_screen_readers_hear_sentences_not_tokens(page: Page, fake: FakeServer) -> None:
    fake.pause_s = 0.002
    page.ask("a long story")
    spoken = page.js("return [...document.querySelectorAll('#live p')].map(p => p.textContent)")
    assert len(spoken) < 20 and spoken[-1].endswith("Answer finished, 721 tokens.")
    assert all("sentence about the sea." in line for line in spoken[:-1])

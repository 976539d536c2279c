"""Chat rendering against transformers, byte for byte, and what Sterna adds to it."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from sterna.core.errors import RequestError
from sterna.text.chat import ChatRenderer
from sterna.text.spec import TokenizerSpec
from sterna.text.tokenizer import Tokenizer
from sterna.text.tools import ToolStyle, parse_answer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- set ns = namespace(found=false) %}
{%- for m in messages %}
    {%- if m.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('no role ' + m.role) }}
    {%- endif %}
    {%- if m.role == 'system' %}{% set ns.found = true %}{% endif %}
    {{- '<h>' ~ m.role ~ '</h>\n\n' ~ m.content | trim ~ eos_token }}
{%- endfor %}
{%- if not ns.found %}{{ '(no system)' }}{% endif %}
{%- if add_generation_prompt %}{{- '<h>assistant</h>\n\n' }}{% endif %}"""

TOOLS_TEMPLATE = """{%- if tools %}
    {{- '# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ '\n' }}
        {{- tool.function | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- '[' + message.role + '] ' + message.content }}
    {%- endif %}
{%- endfor %}
{%- for doc in documents or [] %}{{ doc.title | upper }}{% endfor %}"""

LOOPS = """{% for message in messages %}
  {% if loop.index0 == 2 %}{% break %}{% endif %}
  {% if message.role == 'system' %}
    {% continue %}
  {% endif %}
  {% generation %}
  {{ message.content }}|
  {% endgeneration %}
{% endfor %}
{{ strftime_now('%Y-%m')}} {{ thinking | default('off') }}"""

PARTS = """{% for message in messages %}{{ message.role }}:
{% for part in message['content'] %}
{% if part.type == 'text' %}{{ part.text }}{% endif %}
{% endfor %}
{% endfor %}"""

TALK = [
    {"role": "system", "content": 'Be "brief" & <kind>.\n'},
    {"role": "user", "content": " Gr\u00fc\u00dfe! \U0001f426  "},
    {"role": "assistant", "content": "Hi\n\n"},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter f\u00fcr <Ort>",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
A_AND_B = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
PARTS_TALK = [{"role": "user", "content": A_AND_B}]
WEATHER_CALL = {"name": "weather", "arguments": {"at": "Z\u00fcrich"}}
TOOL_TALK = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "weather", "arguments": {"at": "Z\u00fcrich"}},
            }
        ],
    },
    {"role": "tool", "content": "rain"},
]


def renderer(template):
    backend = Backend(WordLevel({"x": 0}, unk_token="x"))
    return ChatRenderer(
        Tokenizer(TokenizerSpec(backend, (0,), chat_template=template, special_tokens=SPECIAL))
    )


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    backend = Backend(WordLevel({"x": 0, "<s>": 1, "</s>": 2}, unk_token="x"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)

    def render(template, messages, **options):
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )

    return render


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, HEADERS, LOOPS])
@pytest.mark.parametrize("num_messages", [1, 2, 4])
def test_equal_to_transformers(theirs, template, num_messages, prompt):
    ours = renderer(template).render(TALK[:num_messages], add_generation_prompt=prompt)
    assert ours == theirs(template, TALK[:num_messages], add_generation_prompt=prompt)


def test_tools_documents_and_variables_equal_transformers(theirs):
    documents = [{"title": "a", "text": "b"}]
    ours = renderer(TOOLS_TEMPLATE).render(TOOL_TALK, [TOOL], False, documents=documents)
    assert ours == theirs(TOOLS_TEMPLATE, TOOL_TALK, tools=[TOOL], documents=documents)
    assert '"Z\u00fcrich"' in ours
    ours = renderer(LOOPS).render(TALK, thinking="on")
    assert ours == theirs(LOOPS, TALK, add_generation_prompt=True, thinking="on")


@pytest.mark.parametrize("template", [CHATML, HEADERS])
@pytest.mark.parametrize("num_messages", [2, 3])
def test_continued_message_equals_transformers(theirs, template, num_messages):
    talk = TALK[:num_messages]
    ours = renderer(template).render(talk, None, False, continue_final_message=True)
    assert ours == theirs(template, talk, continue_final_message=True)
    assert "STERNA" not in ours


def test_parts_equal_transformers(theirs):
    ours = renderer(PARTS).render(PARTS_TALK)
    assert ours == theirs(PARTS, PARTS_TALK, add_generation_prompt=True)
    continued = renderer(PARTS).render(PARTS_TALK, None, False, continue_final_message=True)
    assert continued == theirs(PARTS, PARTS_TALK, continue_final_message=True)


def test_parts_become_lines_for_templates_that_want_text():
    assert "user\na\nb<|im_end|>" in renderer(CHATML).render(PARTS_TALK)


def test_argument_text_becomes_an_object():
    talk = json.loads(json.dumps(TOOL_TALK))
    talk[1]["tool_calls"][0]["function"]["arguments"] = '{"at": "Z\u00fcrich"}'
    rendered = renderer(TOOLS_TEMPLATE)
    assert rendered.render(talk, [TOOL]) == rendered.render(TOOL_TALK, [TOOL])
    talk[1]["tool_calls"][0]["function"]["arguments"] = '{"at": "cut'
    assert '"{\\"at\\": \\"cut"' in rendered.render(talk, [TOOL])


def test_tools_reach_models_whose_template_knows_none():
    text = renderer(CHATML).render([{"role": "system", "content": "Be kind."}, *TOOL_TALK], [TOOL])
    assert text.startswith("<|im_start|>system\nBe kind.\n\n")
    assert "Wetter f\u00fcr <Ort>" in text
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in text
    said = text.split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0]
    (call,) = parse_answer(said, ToolStyle.HERMES).calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"at": "Z\u00fcrich"})
    assert renderer(CHATML).render(TOOL_TALK[:1], [TOOL]).startswith("<|im_start|>system\nYou can")
    assert renderer(CHATML).render(TOOL_TALK[:1], []).startswith("<|im_start|>user")


def test_no_template_warns_once_and_renders_plainly(caplog):
    with caplog.at_level("WARNING", "sterna"):
        plain = renderer(None)
        assert plain.render([{"role": "user", "content": "Hi"}]) == "user: Hi\n\nassistant:"
        plain.render([{"role": "user", "content": "Hi"}])
    assert len([r for r in caplog.records if "chat template" in r.message]) == 1


def test_the_callers_messages_are_left_alone():
    talk = json.loads(json.dumps(TOOL_TALK))
    renderer(CHATML).render(talk, [TOOL], False, continue_final_message=True)
    assert talk == TOOL_TALK


@pytest.mark.parametrize(
    ("template", "messages", "found"),
    [
        (HEADERS, [{"role": "wizard", "content": "x"}], "no role wizard"),
        (CHATML, [], "messages is empty"),
        (CHATML, ["hi"], r"messages\[0\] is not an object"),
        (CHATML, [{"content": "x"}], r"messages\[0\]"),
        (CHATML, [{"role": "user", "content": 3}], "content is a int"),
        (CHATML, [{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        (CHATML, [{"role": "user", "content": ["x"]}], "'str'"),
        (CHATML, [{"role": "assistant", "tool_calls": [{}]}], "function.name"),
        ("{{ 1 / 0 }}", TALK, "division"),
        ("{{ messages + 1 }}", TALK, "refuses"),
        ("{{ messages.append(1) }}", TALK, "refuses"),
        ("{{ ''.__class__.__mro__ }}", TALK, "refuses"),
        ("{{ x.y }}", TALK, "undefined"),
        ("{% for %}", TALK, "refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", TALK, "recursion"),
    ],
)
def test_refusals_name_the_reason(template, messages, found):
    with pytest.raises(RequestError, match=found):
        renderer(template).render(messages)


def test_continuing_has_its_own_errors():
    with pytest.raises(RequestError, match="choose one"):
        renderer(CHATML).render(TALK, continue_final_message=True)
    with pytest.raises(RequestError, match="no text"):
        renderer(PARTS).render(
            [{"role": "user", "content": []}], None, False, continue_final_message=True
        )
    with pytest.raises(RequestError, match="drops"):
        renderer("nothing").render(TALK, None, False, continue_final_message=True)


def test_template_variables_are_plain_data():
    with pytest.raises(RequestError, match="JSON data only"):
        renderer(CHATML).render(TALK, handle=open)

"""What is trained of a conversation: exactly what the model has to write, for many templates.

The templates are written here after the shapes that models use; what they have in common with them
is what makes masks go wrong: headers, trimmed content, moved system prompts, dropped reasoning.
"""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers
from tokenizers.models import BPE, WordLevel

from sterna.core.errors import RequestError
from sterna.text.chat import ChatRenderer
from sterna.text.spec import TokenizerSpec
from sterna.text.tokenizer import Tokenizer
from sterna.text.trained import trained_text

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + \
'<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = """{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}\
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}\
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + \
'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\
{% endif %}"""
# The system prompt goes into the last user turn, so earlier renderings are no prefixes.
MISTRAL = """{{ bos_token }}{% set ns = namespace(system='', last=-1) %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\n\n' %}{% endif %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' }}{% if loop.index0 == ns.last %}{{ ns.system }}{% endif %}\
{{ m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}\
{{ raise_exception('no') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + \
m.content | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
# Reasoning is written for turns after the last question only; an empty block when there is none.
THINKING = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}\
{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last %}\
{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}\
{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' + (call.function | tojson) + \
'\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}\
{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + \
'\n</tool_response><|im_end|>\n' }}\
{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{# tools #}"""
# The prompt opens the reasoning; the history drops it.
OPENED = """{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}{% else %}\
{{ '<A>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"""

ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def renderer(template):
    backend = Backend(WordLevel({"x": 0}, unk_token="x"))
    backend.add_special_tokens(list(ENDS))
    ids = tuple(backend.token_to_id(end) for end in ENDS)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatRenderer(
        Tokenizer(TokenizerSpec(backend, ids, chat_template=template, special_tokens=special))
    )


def trained(template, messages, train_on="completions", **options):
    found = trained_text(renderer(template), messages, None, train_on, **options)
    assert found.text == renderer(template).render(messages, None, False, **options)
    return [found.text[a:b] for a, b in found.spans]


def talk(*contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


# The answer stands in the question and in the system prompt: a text search would find it there.
TALK = talk("say yes", "yes", "again: yes<br>", " yes\n", system="yes")
NO_SYSTEM = TALK[1:]


@pytest.mark.parametrize(
    ("template", "messages", "wanted"),
    [
        (CHATML, TALK, ["yes<|im_end|>", " yes\n<|im_end|>"]),
        (MARKED, TALK, ["yes<|im_end|>", " yes\n<|im_end|>"]),
        (LLAMA3, TALK, ["yes<|eot_id|>", "yes<|eot_id|>"]),
        (MISTRAL, TALK, [" yes</s>", " yes</s>"]),
        (MISTRAL, NO_SYSTEM, [" yes</s>", " yes</s>"]),
        (GEMMA, NO_SYSTEM, ["yes<end_of_turn>", "yes<end_of_turn>"]),
        (THINKING, TALK, ["yes<|im_end|>", "<think>\n\n</think>\n\n yes\n<|im_end|>"]),
        (OPENED, NO_SYSTEM, ["yes</s>", " yes\n</s>"]),
    ],
)
def test_the_turns_of_the_assistant(template, messages, wanted):
    got = trained(template, messages)
    # Where the space before an answer is the template's own it may be on either side of the border.
    assert [g.lstrip() if template is MISTRAL else g for g in got] == [
        w.lstrip() if template is MISTRAL else w for w in wanted
    ]
    assert trained(template, messages, "last") == got[-1:]
    (whole,) = trained(template, messages, "all")
    assert whole == renderer(template).render(messages, None, False)


@pytest.mark.parametrize("template", [CHATML, MARKED, LLAMA3, MISTRAL, THINKING])
def test_a_message_can_be_left_out(template):
    messages = [*TALK]
    messages[2] = {**messages[2], "train": False}
    assert trained(template, messages) == trained(template, TALK)[1:]
    messages[2] = {**TALK[2], "weight": 0}
    assert trained(template, messages) == trained(template, TALK)[1:]


def call(name):
    return [{"type": "function", "function": {"name": name, "arguments": {"at": "yes"}}}]


def test_tool_calls_are_trained_and_results_are_not():
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "tool_calls": call("look"), "reasoning_content": "hm"},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes", "reasoning_content": "let me see"},
    ]
    called = '<tool_call>\n{"name": "look", "arguments": {"at": "yes"}}\n</tool_call><|im_end|>'
    assert trained(THINKING, messages) == [
        called,
        "yes<|im_end|>",
        "<think>\nlet me see\n</think>\n\nyes<|im_end|>",
    ]
    assert trained(THINKING, messages[:4]) == [
        "<think>\nhm\n</think>\n\n" + called,
        "<think>\n\n</think>\n\nyes<|im_end|>",
    ]


def test_tools_of_a_template_that_knows_none_are_described_and_calls_trained():
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": None, "tool_calls": call("look")},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "yes"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    found = trained_text(renderer(CHATML), messages, tools)
    assert [found.text[a:b] for a, b in found.spans] == [
        '<tool_call>\n{"name": "look", "arguments": {"at": "yes"}}\n</tool_call><|im_end|>',
        "yes<|im_end|>",
    ]


def test_the_assistant_may_speak_first_and_twice():
    messages = [
        {"role": "assistant", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi"},
    ]
    assert trained(CHATML, messages) == ["Hi<|im_end|>", "Ho<|im_end|>", "Hi<|im_end|>"]


def test_no_template():
    assert trained(None, talk("a", "b")) == [" b\n\n"]


SHARES = "{% for m in messages %}{{ m.content }} of {{ messages[-1].content }};{% endfor %}"
DROPS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [SHARES, DROPS])
def test_what_cannot_be_told_apart_is_refused(template):
    with pytest.raises(RequestError, match=r"messages\[[13]\] be told from"):
        trained(template, talk("a", "b", "c", "d"))


def test_choosing_among_blocks_that_are_not_one_a_message_is_refused():
    one_block = (
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    )
    assert trained(one_block, talk("a", "b", "c", "d")) == ["abcd"]
    with pytest.raises(RequestError, match="1 generation blocks for 2"):
        trained(one_block, talk("a", "b", "c", "d"), "last")


def test_marked_blocks_as_transformers_masks_them():
    transformers = pytest.importorskip("transformers")
    letters = {chr(i): i for i in range(33, 127)} | {"\u2423": 200, "\n": 201}
    backend = Backend(BPE({**letters, "?": 202}, [], unk_token="?"))
    backend.normalizer = normalizers.Replace(" ", "\u2423")
    backend.add_special_tokens(list(ENDS))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoded = theirs.apply_chat_template(
        TALK, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    ours = Tokenizer(TokenizerSpec(backend, (300,), chat_template=MARKED))
    found = trained_text(ChatRenderer(ours), TALK)
    ids = ours.encode(found.text, add_special_tokens=False)
    starts = ours.token_starts(found.text, ids)
    mask = [int(any(a <= s < b for a, b in found.spans)) for s in starts]
    assert ids == list(encoded["input_ids"])
    assert mask == list(encoded["assistant_masks"])

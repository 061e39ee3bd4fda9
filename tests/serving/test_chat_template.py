"""Chat templates: where they come from, what they may use, what goes wrong, and BOS exactly once."""

from __future__ import annotations

import base64
import datetime
import json
from pathlib import Path

import pytest

from paddock.serving.chat_template import ChatTemplate
from paddock.serving.tokenizer import Tokenizer, load_tokenizer

# The shape of Llama 3's template, and of Llama 2's refusals.
HEADERS = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("Unknown role: " + message.role) }}
    {%- endif %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
PARTS_ONLY = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}"
    "{% endfor %}{% endfor %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    lines = (base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(plain_folder) -> Tokenizer:
    return load_tokenizer(plain_folder)


@pytest.fixture
def inline(plain_folder, tokenizer):
    """Render `messages` with a template given as text."""

    def render(source: str, messages=HELLO, **kwargs) -> str:
        return ChatTemplate.load(plain_folder, tokenizer, source).render(messages, **kwargs)

    return render


def test_conversation_with_bos_exactly_once(inline, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    text = inline(HEADERS, messages)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert inline(HEADERS, messages, add_generation_prompt=False) == text.removesuffix(
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    without = tokenizer.encode(inline(HEADERS.replace("{{ bos_token }}", ""), messages))
    assert without == ids
    assert sum(tokenizer.id_to_piece(token) == "<|start_header_id|>" for token in ids) == 3


def test_template_file_comes_before_the_settings(tmp_path, tokenizer):
    settings = {"chat_template": "settings {{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.load(tmp_path, tokenizer).render(HELLO) == "settings Hello"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert ChatTemplate.load(tmp_path, tokenizer).render(HELLO) == "file Hello"
    override = tmp_path / "mine.jinja"
    override.write_text("mine {{ messages[0].content }}")
    assert ChatTemplate.load(tmp_path, tokenizer, str(override)).render(HELLO) == "mine Hello"
    assert ChatTemplate.load(tmp_path, tokenizer, "{{ messages[0].content }}!").render(HELLO) == "Hello!"


@pytest.mark.parametrize("as_files", [False, True])
def test_named_templates(tmp_path, tokenizer, as_files):
    sources = {"default": "plain", "tool_use": "tools {{ tools[0].function.name }}"}
    if as_files:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(sources["default"])
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(sources["tool_use"])
    else:
        named = [{"name": name, "template": source} for name, source in sources.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path, tokenizer)
    assert template.render(HELLO) == "plain"
    assert template.render(HELLO, tools=[{"type": "function", "function": {"name": "add"}}]) == "tools add"


def test_named_templates_without_a_default(tmp_path, tokenizer):
    named = [{"name": "rag", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    with pytest.raises(ValueError, match=r"no default chat template, only \['rag'\]"):
        ChatTemplate.load(tmp_path, tokenizer).render(HELLO)


def test_no_template_says_so(tmp_path, tokenizer):
    template = ChatTemplate.load(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="has no chat template") as error:
        template.render(HELLO)
    assert str(tmp_path) in str(error.value)


def test_names_and_filters_of_templates(inline):
    assert inline("{{ eos_token }}|{{ unheard_of }}|{{ extra }}", extra=7) == "<|end_of_text|>||7"
    assert inline("{{ messages[0] | tojson }}", [{"role": "user", "content": "<é>&'"}]) == (
        '{"role": "user", "content": "<é>&\'"}'
    )
    assert inline("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert inline("{{ strftime_now('%Y') }}") in {str(datetime.datetime.now().year + i) for i in (-1, 0)}
    assert inline("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert inline("a {% generation %}b {{ messages[0].role }}{% endgeneration %} c") == "a b user c"
    assert inline("{% if true %}\n  {% set x = 1 %}\nx{% endif %}") == "x"  # blocks leave no blank lines


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Only one system message!') }}", "Only one system message!"),
        ("{{ unheard_of.name }}", "'unheard_of' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ range(10000000) | list }}", "Range too big"),
        ("{{ 1 + 'a' }}", "failed with TypeError"),
        ("{{ 1 / 0 }}", "failed with ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_a_value_error(inline, source, message):
    with pytest.raises(ValueError, match=message):
        inline(source)


def test_unknown_role_is_the_templates_own_refusal(inline):
    with pytest.raises(ValueError, match="Unknown role: clown"):
        inline(HEADERS, [{"role": "clown", "content": "x"}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n{% if %}", "chat_template.jinja, line 2"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_template_file_that_is_broken(tmp_path, tokenizer, content, message):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        ChatTemplate.load(tmp_path, tokenizer)
    assert str(path) in str(error.value)


def test_override_that_is_not_there(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"nowhere.jinja cannot be read"):
        ChatTemplate.load(tmp_path, tokenizer, str(tmp_path / "nowhere.jinja"))


@pytest.mark.parametrize("value", [3, ["a"], [{"name": "default"}], [{"name": "default", "template": 3}]])
def test_settings_with_a_malformed_template(tmp_path, tokenizer, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template"):
        ChatTemplate.load(tmp_path, tokenizer)


def test_text_parts_become_a_string(inline):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    assert inline("{{ messages[0].content }}", messages) == "one\ntwo"
    assert messages[0]["content"] is parts  # the caller's messages stay as they are


def test_template_that_wants_parts_gets_parts(inline):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert inline(PARTS_ONLY, [{"role": "user", "content": parts}]) == "[one][two]"
    assert inline(PARTS_ONLY, HELLO) == "[Hello]"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list that is not empty"),
        (3, "must be a list that is not empty"),
        (["hi"], r"messages\[0\] must be an object with a role"),
        ([*HELLO, {"content": "x"}], r"messages\[1\] must be an object with a role"),
        ([{"role": "user"}], r"messages\[0\].content must be a string"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be a string"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "of type 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] is of type 'text'"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] is of type 'str'"),
        ([{"role": "assistant", "tool_calls": 3}], r"tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls must be objects with a function"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "arguments are not JSON"),
    ],
)
def test_malformed_messages(inline, messages, message):
    with pytest.raises(ValueError, match=message):
        inline("{{ messages[0].content }}", messages)


def test_tool_call_arguments_arrive_as_an_object(inline):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert inline("{{ messages[1].tool_calls[0].function.arguments.a + 1 }}", messages) == "2"
    assert call["function"]["arguments"] == '{"a": 1}'

"""Chat templates of foreign folders: rendered as transformers renders them, and bounded whatever they ask for."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pangu_sigma.data.imported_chat_template import ImportedChatTemplate, imported_template
from pangu_sigma.errors import UserError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' ~ message.content | trim ~ '<|im_end|>' + '\\n' }}
    {%- endif %}
    {%- if loop.last and loop.length > 3 %}{{ '[long]' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
OLMOE = (
    "{{ bos_token }}{% for message in messages %}\n{% if message['role'] == 'system' %}\n{{ '<|system|>\n' + "
    "message['content'] }}\n{% elif message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] }}\n{% elif "
    "message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if "
    "loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
OTHER = """{% macro say(m, n=1) %}[{{ m.role | upper }} {{ n }}]{{ m['content'].replace('a', '<b>') }}{% endmacro %}
{% set ns = namespace(count=0, roles=[]) %}
{% for m in messages if m.role != 'tool' %}{% set ns.count = ns.count + 1 %}{{ say(m, ns.count * 2) }}
{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}
{{ messages | map(attribute='role') | join(', ') }} {{ {'k': messages[0].content} | tojson }} {{ range(3) | list }}
{{ messages[::-1][0].content.split('x')[-1] | trim }}{{ 7 % 4 }}{{ "".join(['p', 'q']) }}
{% if tools is not none or documents is not none %}TOOLS{% endif %}{% generation %}said{% endgeneration %}
{{ {'b': 1, 'a': [2]} | tojson(separators=(',', ':'), sort_keys=True) }}{{ "x\ny" | indent(2) }}"""
TALKS = [
    [("user", "hi there")],
    [("system", "be nice\n"), ("user", "a <b> 'x' é 😀"), ("assistant", "ok"), ("user", "bye ")],
    [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five")],
]


@pytest.mark.parametrize("template", [CHATML, OLMOE, OTHER], ids=["chatml", "olmoe", "other"])
@pytest.mark.parametrize("turns", TALKS, ids=range(len(TALKS)))
def test_a_conversation_is_rendered_as_transformers_does(template, turns):
    messages = [{"role": role, "content": text} for role, text in turns]
    (expected,), _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, **SPECIAL
    )
    assert ImportedChatTemplate(template, SPECIAL).render(turns) == expected


def test_an_assistants_last_turn_is_continued():
    text = ImportedChatTemplate(CHATML, SPECIAL).render([("user", "hi"), ("assistant", "well, ")])
    assert text.endswith("<|im_start|>assistant\nwell,")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x | join(ns.x) %}{% endfor %}",
        "{{ 'a' * 10000000000 }}", "{{ '%10000000000d' % 1 }}", "{{ 'a'.center(10000000000) }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        "{{ ns.x | string }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='a') %}{% for i in range(21) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
        "{% for i in range(9999) %}{% set ns.y = ns.x | upper %}{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in range(49000) %}{% if -1 in l %}{% endif %}{% endfor %}",
        "{{ [1] | slice(999999999) | list }}", "{{ [1] | batch(999999999, 'x') | list }}",
        "{{ 'a'.ljust(10000000000) }}", "{{ '{:10000000000}'.format('a') }}", "{{ lipsum(100000) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{% include 'x' %}",
        "{{ messages | attr('x') }}", "{{ 1 / 0 }}", "{{ messages[7].content.x.y }}",
        "{% for m in messages %}{{ 'x' * 2 }}{% endfor %}",
        "{% set counted = 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)  # fmt: skip
def test_a_hostile_template_is_refused_at_once(template):
    began = time.monotonic()
    with pytest.raises(UserError, match="chat template"):
        ImportedChatTemplate(template, SPECIAL).render([("user", "hi")])
    assert time.monotonic() - began < 5


def test_a_template_that_cannot_be_read_is_refused_as_it_is_opened():
    with pytest.raises(UserError, match="cannot be read .*: repair it"):
        ImportedChatTemplate("{% for %}", {})
    with pytest.raises(UserError, match="has 300,000 characters"):
        ImportedChatTemplate("x" * 300_000, {})


def test_what_the_template_itself_refuses_is_its_own_sentence():
    template = ImportedChatTemplate("{{ raise_exception('Roles must alternate, ' ~ messages[0].role) }}", {})
    with pytest.raises(UserError, match="^Roles must alternate, user$"):
        template.render([("user", "x")])


def test_where_it_stands():
    settings = {"bos_token": {"content": "<s>", "lstrip": False}, "chat_template": "{{ bos_token }}old"}

    def opened(**files: object):
        return imported_template(SimpleNamespace(companions={
            name.replace("__", "."): (text if isinstance(text, str) else json.dumps(text)).encode()
            for name, text in files.items()
        }))  # fmt: skip

    assert opened() is None and opened(tokenizer_config__json={"bos_token": "<s>"}) is None
    assert opened(tokenizer_config__json=settings).render([("user", "x")]) == "<s>old"
    both = opened(tokenizer_config__json=settings, chat_template__jinja="{{ bos_token }}new")
    assert both.render([("user", "x")]) == "<s>new"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert opened(tokenizer_config__json={"chat_template": several}).render([("user", "x")]) == "yes"

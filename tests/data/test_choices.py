"""Rows to be scored: what they may be, and the line that each fault gets."""

from __future__ import annotations

import pytest

from jaxbias.data import sources
from jaxbias.data.rows import Choice
from tests.data import message


def test_choices_are_read(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('\ufeff{"id": "a", "context": "", "options": ["x", "y"]}\n\n'
                  '{"id": "b", "context": "Q:", "options": [" line\u2028break"], "note": 3}\r\n')
  assert sources.read_choices(path) == [Choice("a", "", ("x", "y")), Choice("b", "Q:", (" line\u2028break",))]


@pytest.mark.parametrize(("line", "said"), [
  (b'{"id": "b"', "not JSON (Expecting ',' delimiter)."),
  (b'["b"]', "a JSON object with `options` is needed."),
  (b'{"id": "b", "options": ["x"]}', "`context` is missing."),
  (b'{"id": "b", "context": 1, "options": ["x"]}', "`context` has to be a string."),
  (b'{"id": "b", "context": "", "options": []}', "`options` has to be a list of strings, none of them empty."),
  (b'{"id": "b", "context": "", "options": ["x", ""]}', "`options` has to be a list of strings, none of them empty."),
  (b'{"id": "b", "context": "", "options": "x"}', "`options` has to be a list."),
  (b'{"id": "", "context": "", "options": ["x"]}', "`id` is empty."),
  (b'{"id": "caf\xe9", "context": "", "options": ["x"]}', "not UTF-8."),
])
def test_a_faulty_line_is_named(tmp_path, line, said):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"id": "a", "context": "", "options": ["x"]}\n\n' + line + b"\n")
  assert message(sources.read_choices, path) == f"{path} line 3: {said}"


def test_ids_are_unique_and_there_is_at_least_one_row(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"id": "a", "context": "", "options": ["x"]}\n' * 2)
  assert message(sources.read_choices, path) == f"{path} line 2: id `a` was already used, see {path} line 1."
  path.write_text("\n")
  assert message(sources.read_choices, path) == f"{path} holds no rows."

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxbias.data.tokens import answer_mask, check_vocabulary, load_tokenizer, tokenizer_of_metadata
from jaxbias.errors import UserError
from tests.conftest import BYTE_LEVEL, TOKENS

REPOSITORY = Path(__file__).resolve().parents[2]
ORACLES = REPOSITORY.parent / "shared" / "oracles" / "smollm2"


@pytest.fixture
def save(tmp_path):
  """save(files, **metadata) writes a folder with the tokenizer of the metadata and loads it."""

  def run(files=None, **metadata):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (BYTE_LEVEL | metadata).items()}
    tokenizer_of_metadata(metadata, "x.gguf").save(str(tmp_path / "tokenizer.json"))
    for name, content in (files or {"tokenizer_config.json": {"bos_token": TOKENS[1], "eos_token": TOKENS[2]}}).items():
      (tmp_path / name).write_text(json.dumps(content))
    return load_tokenizer(tmp_path)

  return run


def pieces(tokenizer, text):
  return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


def test_round_trip_and_no_special_tokens(save):
  tokenizer = save(add_bos_token=True)
  text = "the cat's naïve 日本 🙂\n\n  12 <|im_end|>x"
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text and ids[0] != 1 and 2 in ids
  assert tokenizer.encode_batch([text, "", "the"]) == [ids, [], tokenizer.encode("the")]
  assert tokenizer.backend.encode("the").ids[0] == 1  # other programs get the BOS that the file asks for


def test_merges_and_words(save):
  assert pieces(save(), "the cat 12") == ["the", "Ġcat", "Ġ", "1", "2"]  # digits apart: the merge `1 2` is never met
  assert pieces(save(pre="gpt-2"), "the cat 12") == ["the", "Ġcat", "Ġ", "12"]
  assert pieces(save(pre="llama-bpe"), "the cat 1212") == ["the", "Ġcat", "Ġ", "12", "1", "2"]  # digits by three


def test_offsets_are_characters_and_cover_the_text(save):
  text = " the 日本 cat"
  ids, offsets = save().encode_with_offsets(text)
  assert len(ids) == len(offsets) and offsets[0] == (0, 4) and offsets[-1] == (len(text) - 4, len(text))
  assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text)))


def test_context_and_option_are_tokenised_apart(save):
  tokenizer = save()
  assert tokenizer.join("the c", "at") == (tokenizer.encode("the c"), tokenizer.encode("at"))
  assert len(sum(tokenizer.join("the c", "at"), [])) > len(tokenizer.encode("the cat"))
  assert tokenizer.join("", "the")[0] == []


def test_the_answer_begins_with_the_first_token_that_reaches_past_the_prefix(save):
  tokenizer = save()
  text = "the cat a"
  ids, start = answer_mask(tokenizer, text, len("the"))
  assert ids == tokenizer.encode(text) and pieces(tokenizer, text)[start:] == ["Ġcat", "Ġa"]  # the space goes with it
  assert answer_mask(tokenizer, text, 0)[1] == 0
  assert answer_mask(tokenizer, text, len("the c"))[1] == 1  # a token across the border belongs to the answer
  split = "x 日本"  # a character of several tokens is whole in the answer
  ids, start = answer_mask(tokenizer, split, 2)
  assert tokenizer.decode(ids[start:]) == "日本"
  with pytest.raises(UserError, match="no answer after the first 9 characters of 'the cat a'"):
    answer_mask(tokenizer, text, len(text))


@pytest.mark.parametrize(
  "files, expected",
  [
    ({"tokenizer_config.json": {"bos_token": TOKENS[1], "eos_token": {"content": TOKENS[2]}}}, (1, 2, 2, 1)),
    ({"tokenizer_config.json": {"bos_token": None, "eos_token": TOKENS[0], "pad_token": TOKENS[1]},
      "config.json": {"bos_token_id": 2}}, (None, 0, 1, 0)),
    ({"special_tokens_map.json": {"bos_token": TOKENS[1]}, "config.json": {"eos_token_id": [2, 0]}}, (1, 2, 2, 1)),
    ({"config.json": {"bos_token_id": 0, "eos_token_id": 0}}, (0, 0, 0, 0)),
  ],
)  # fmt: skip
def test_special_tokens_are_named_by_the_first_file_that_mentions_them(save, files, expected):
  found = save(files)
  assert (found.bos_id, found.eos_id, found.pad_id, found.start_id) == expected


def test_neither_bos_nor_eos(save):
  tokenizer = save({"config.json": {}})
  assert tokenizer.pad_id == 0
  with pytest.raises(UserError, match="no BOS and no EOS"):
    _ = tokenizer.start_id


@pytest.mark.parametrize("special,named,expected", [
  (["[CLS]", "[SEP]", "[MASK]"], {}, True),  # customary names, as the first encoders' folders have no others
  (["<s>", "</s>", "<mask>"], {}, True),
  (["begin", "end", "blank"], {"cls_token": "begin", "sep_token": "end", "mask_token": {"content": "blank"}}, True),
  (["<s>", "</s>", "<mask>"], {"cls_token": None, "sep_token": None, "mask_token": None}, False),
  ([], {}, False),
])  # fmt: skip
def test_an_encoders_special_tokens(tmp_path, save, special, named, expected):
  backend = save().backend
  backend.add_special_tokens(special)
  backend.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
  found = load_tokenizer(tmp_path)
  if expected:
    assert [found.special(name) for name in ("cls", "sep", "mask")] == [len(TOKENS) + i for i in range(3)]
  else:
    with pytest.raises(UserError, match="names no mask token, which a masked language model needs; add `mask_token`"):
      found.special("mask")


def test_vocabulary_and_fingerprint(save):
  tokenizer = save()
  assert tokenizer.vocab_size == len(TOKENS) and len(tokenizer.fingerprint) == 64
  check_vocabulary(tokenizer, len(TOKENS))
  check_vocabulary(tokenizer, len(TOKENS) + 100)  # models are often padded
  with pytest.raises(UserError, match=f"ids up to {len(TOKENS) - 1} and the model has 100 embeddings"):
    check_vocabulary(tokenizer, 100)
  assert save(pre="gpt-2").fingerprint != tokenizer.fingerprint == save().fingerprint


def test_a_folder_that_lacks_a_tokenizer_or_has_a_broken_one(tmp_path, save):
  with pytest.raises(UserError, match="has no tokenizer.json; write one"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
    load_tokenizer(tmp_path)
  with pytest.raises(UserError, match="holds no JSON object"):
    save({"tokenizer_config.json": []})


def test_truncation_and_padding_in_the_file_are_turned_off(tmp_path, save):
  backend = save().backend
  backend.enable_truncation(2)
  backend.enable_padding(length=8)
  backend.save(str(tmp_path / "tokenizer.json"))
  assert len(load_tokenizer(tmp_path).encode("the cat a cat")) == 4


def sentencepiece_by_hand(text, scores):
  """SentencePiece BPE as published: merge the neighbours whose join has the best score, until none is in the list."""
  parts = list("▁" + text.replace(" ", "▁"))
  while True:
    joins = [(scores[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
    if not joins:
      return parts
    i = -max(joins)[1]
    parts[i : i + 2] = ["".join(parts[i : i + 2])]


def test_sentencepiece_style(save):
  words = ["▁t", "he", "▁the", "at", "▁c", "▁cat", "ca", "▁a", "hea"]
  letters = ["▁", *"theca"]
  byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
  tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *words, *letters]
  scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))]
  types = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))
  tokenizer = save(
    {"tokenizer_config.json": {"bos_token": "<s>"}},
    model="llama", tokens=tokens, scores=scores, token_type=types, unknown_token_id=0,
  )  # fmt: skip
  known = dict(zip(tokens[259:], scores[259:], strict=True))
  for text in ("the cat", "heat a cat", "at  the teat", "cheat", "ahea"):
    assert pieces(tokenizer, text) == sentencepiece_by_hand(text, known)
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert pieces(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
  assert tokenizer.decode(tokenizer.encode("cat é🙂")) == "cat é🙂"
  assert tokenizer.backend.encode("the").ids[0] == 1


def test_no_jax():
  code = "import sys, jaxbias.data.tokens, jaxbias.models.sources; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# The real one


def test_smollm2_gives_the_ids_that_hugging_face_gives(smollm2):
  """Expected ids: Hugging Face transformers 5.23 reading the same GGUF."""
  tokenizer = load_tokenizer(smollm2.path)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 2, 49152)
  check_vocabulary(tokenizer, 49152)
  expected = {
    "The chess player was asian.": [504, 22628, 7081, 436, 347, 697, 30],
    " naïve 日本 🙂\n\n  x's": [15486, 46494, 17097, 241, 115, 40993, 47526, 8866, 1792, 506],
    "<|im_start|>user\nHi in 2015<|im_end|>\n": [1, 4093, 198, 26843, 281, 216, 34, 32, 33, 37, 2, 198],
  }
  for text, ids in expected.items():
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


@pytest.mark.skipif(not ORACLES.is_dir(), reason="needs ../shared/oracles/smollm2")
@pytest.mark.parametrize("name, options", [("stereoset_intra", 6318), ("crows_dev", 1520), ("bbq_sample", 900)])
def test_smollm2_counts_tokens_as_the_oracle_does(smollm2, name, options):
  tokenizer = load_tokenizer(smollm2.path)
  scores = json.loads((ORACLES / f"{name}.scores.json").read_text())
  rows = [json.loads(line) for line in (ORACLES / f"{name}.rows.jsonl").open()]
  counts = [len(ids) for ids in tokenizer.encode_batch([option for row in rows for option in row["options"]])]
  assert counts == [tokens for row in rows for _, tokens in scores[row["id"]]] and len(counts) == options

"""Readers: what they read, and the line that each fault gets."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

import pytest

from jaxbias.data import sources
from jaxbias.data.rows import LABELS, Triple
from tests.data import message

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
DEV = SHARED / "data/stereoset/dev.json"
TERM_SPLIT = SHARED / "data/stereoset/target_term_split.json"
needs_stereoset = pytest.mark.skipif(not DEV.exists(), reason="StereoSet's files are not beside the repository")


def record(identity: str, term="nurse", domain="profession", context="The nurse was BLANK.") -> dict:
  fillings = zip(LABELS, ("kind", "rude", "green"), strict=True)
  return {"id": identity, "target": term, "bias_type": domain, "context": context, "sentences": [
    {"id": f"{identity}{label}", "sentence": context.replace("BLANK", word), "gold_label": label}
    for label, word in reversed(list(fillings))]}


def stereoset_file(path: Path, records: list) -> Path:
  path.write_text(json.dumps({"version": "1.0", "data": {"intrasentence": records}}))
  return path


def six_terms() -> list[dict]:
  return [record(f"r{i}", term=f"term {i}") for i in range(6)]


def built_in_folder(folder: Path, triple: dict | None = None, splits: dict | None = None) -> Path:
  fillings = dict(zip(LABELS, ("kind", "rude", "green"), strict=True))
  fixed = fillings | {"domain": "profession", "context": "Nurses are BLANK here."}
  triples = [fixed | {"id": f"t{i}", "term": f"term {i}"} for i in range(3)]
  triples[2] |= triple or {}
  texts = [{"id": f"x{i}", "text": f"Water boils at {i} degrees."} for i in range(3)]
  content = {"rule": "by hand",
             "triples": {"profession": {"train": ["term 0"], "validation": ["term 1"], "test": ["term 2"]}},
             "texts": {"train": ["x0"], "validation": ["x1"], "test": ["x2"]}} | (splits or {})
  (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in triples))
  (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
  (folder / "splits.json").write_text(json.dumps(content))
  return folder


@pytest.fixture
def toy_built_in(tmp_path, monkeypatch):
  """Puts three sentences in the place of the built-in general text."""
  (tmp_path / "builtin").mkdir()
  folder = built_in_folder(tmp_path / "builtin")
  monkeypatch.setattr(sources.resources, "files", lambda package: folder)


# StereoSet's own file.


def test_sentences_come_in_the_order_of_the_labels(tmp_path):
  assert sources.stereoset_triples(stereoset_file(tmp_path / "s.json", [record("a")])) == [
    Triple("a", "profession", "nurse", "The nurse was BLANK.",
           ("The nurse was kind.", "The nurse was rude.", "The nurse was green."), len("The nurse was"))]


@pytest.mark.parametrize(("context", "sentences", "before"), [
  ("The nurse was BLANK.", ("The nurse was kind.",), "The nurse was"),
  ("a Puerto Rican is BLANK", ("A puerto rican is short",), "a Puerto Rican is"),
  ("The tailor made  BLANK", ("The tailor made  coats",), "The tailor made "),
  ("He BLANKed him", ("He protecteded him",), "He"),
  ("BLANK people are tall", ("Dutch people are tall",), ""),
  ("Both sometimes.BLANK", ("Both sometimes.pizza",), "Both sometimes."),
  ("The grand father was BLANK", ("The grand father was old", "The grandfather was young"), "The"),
  ("The cat BLANK", ("The cat slept", "The cats slept"), "The"),
  ("Grandad was BLANK", ("Grandpa was old",), ""),
  ("The nurse was BLANK", ("The nurse was kind", "The nurse"), "The"),
])
def test_the_prefix_ends_where_the_filling_begins(context, sentences, before):
  assert sources.prefix_length(context, sentences) == len(before)


def test_triples_that_do_not_make_clean_answers_are_refused_for_training():
  contexts = {"He is BLANK.": True, "He is BLANK and BLANK.": False, "sometimes.BLANK": False, "a `BLANK": False}
  for context, usable in contexts.items():
    assert sources.usable_for_training(Triple("a", "race", "t", context, ("x", "y", "z"), 0)) is usable


def test_only_the_train_split_loses_triples_and_says_how_many(tmp_path, caplog, toy_built_in):
  records = six_terms() + [record(f"twice{i}", f"term {i}", context="He is BLANK, so BLANK.") for i in range(6)]
  data = sources.load(stereoset_file(tmp_path / "s.json", records))
  assert [len(split.triples) for split in (data.train, data.validation, data.test)] == [3, 4, 2]
  assert "s.json: 3 of 6 train triples are left out" in caplog.text


@needs_stereoset
def test_all_of_stereoset_is_read():
  triples = sources.stereoset_triples(DEV)
  assert len(triples) == 2106
  domains = collections.Counter(triple.domain for triple in triples)
  assert domains == {"gender": 255, "profession": 810, "race": 962, "religion": 79}
  assert len({t.term for t in triples}) == 79
  assert sum(not sources.usable_for_training(t) for t in triples) == 3
  for triple in triples:
    before = triple.context.split("BLANK")[0]
    assert before[triple.prefix:] in ("", " ", "\u00a0")
    for sentence in triple.sentences:
      assert sentence[:triple.prefix].lower() == before[:triple.prefix].lower()
      assert sentence[triple.prefix:].strip()


@needs_stereoset
def test_our_rule_gives_the_published_term_split():
  triples = sources.stereoset_triples(DEV)
  published = json.loads(TERM_SPLIT.read_text())["domains"]
  rule = sources.hash_split(triples)
  assert rule == sources.read_split(TERM_SPLIT)
  assert {domain: {"train": s["train"], "valid": s["validation"], "test": s["test"]} for domain, s in rule.items()
          } == published


@needs_stereoset
def test_stereoset_splits_have_the_published_sizes(toy_built_in):
  data = sources.load(DEV, TERM_SPLIT)
  sizes = [len(split.triples) for split in (data.train, data.validation, data.test)]
  assert sizes == [1079 - 2, 530, 497]  # two of the train triples are not usable for training
  assert data == sources.load(DEV)
  assert [text.id for text in data.test.texts] == ["x2"]


@needs_stereoset
def test_stereoset_rows_to_be_scored_are_those_of_the_oracle():
  rows = sources.read_choices(SHARED / "oracles/smollm2/stereoset_intra.rows.jsonl")
  assert rows == sources.triple_choices(sources.stereoset_triples(DEV))


def test_small_domains_have_no_validation_terms():
  triples = [Triple(str(i), "religion", f"t{i}", "BLANK", ("a", "b", "c"), 0) for i in range(3)]
  split = sources.hash_split(triples)["religion"]
  assert [len(split[name]) for name in ("train", "validation", "test")] == [2, 0, 1]


@pytest.mark.parametrize(("change", "said"), [
  (lambda r: r.update(bias_type="genders"), "`genders` is no domain; did you mean `gender`?"),
  (lambda r: r["sentences"].pop(0), "(id b) has no sentences labelled `unrelated`, one is needed."),
  (lambda r: r["sentences"][0].update(gold_label="stereotype"), "(id b) has 2 sentences labelled `stereotype`"),
  (lambda r: r["sentences"][1].pop("gold_label"), "`gold_label` is missing."),
  (lambda r: r["sentences"][1].update(sentence=" "), "`sentence` is empty."),
  (lambda r: r.pop("target"), "`target` is missing."),
  (lambda r: r.update(id=3), "`id` has to be a string."),
  (lambda r: r.update(context="The nurse."), "`context` holds no BLANK."),
  (lambda r: r.update(id="a"), "id `a` was already used, see"),
])
def test_a_faulty_record_is_named(tmp_path, change, said):
  faulty = record("b")
  change(faulty)
  path = stereoset_file(tmp_path / "s.json", [record("a"), faulty])
  line = message(sources.stereoset_triples, path)
  assert line.startswith(f"{path}, data.intrasentence[1]") and said in line


@pytest.mark.parametrize(("content", "said"), [
  ('{"data": {\n"intrasentence": [,]}}', " line 2: not JSON (Expecting value)."),
  ("[]", " is not StereoSet's JSON: a JSON object with `data` is needed."),
  ('{"rows": []}', " is not StereoSet's JSON: `data` is missing."),
  ('{"data": {"intersentence": []}}', " is not StereoSet's JSON, `data`: `intrasentence` is missing."),
  ('{"data": {"intrasentence": {}}}', " is not StereoSet's JSON, `data`: `intrasentence` has to be a list."),
  ('{"data": {"intrasentence": []}}', ": `data.intrasentence` is empty."),
  ('{"data": {"intrasentence": [3]}}', ", data.intrasentence[0]: a JSON object with `id` is needed."),
])
def test_json_that_is_not_stereosets(tmp_path, content, said):
  path = tmp_path / "s.json"
  path.write_text(content)
  assert message(sources.stereoset_triples, path) == f"{path}{said}"


@pytest.mark.parametrize(("split", "said"), [
  ({"profession": {"train": ["term 0", "term 1"], "valid": ["term 2"], "test": ["term 3", "term 4"]}},
   "term `term 5` is in no split."),
  ({"profession": {"train": ["term 0", "term 1", "term 5"], "valid": ["term 2"], "test": ["term 4", "term 5"]}},
   "term `term 5` is in two splits, train and test."),
  ({"profession": {"train": [f"term {i}" for i in range(6)], "valid": [], "test": []}},
   "the validation split is empty."),
  ({"profession": {"train": [], "valid": []}}, "`profession`: `test` is missing."),
  ({"job": {}}, "`job` is no domain; choose from gender, profession, race, religion."),
  ({"profession": 3}, "`profession`: a JSON object with `train` is needed."),
])
def test_split_files_that_do_not_fit(tmp_path, split, said):
  data = stereoset_file(tmp_path / "s.json", six_terms())
  path = tmp_path / "split.json"
  path.write_text(json.dumps({"domains": split}))
  line = message(sources.load, str(data), str(path))
  assert line.startswith(str(path)) and said in line


def test_a_domain_that_a_split_lacks_is_named(tmp_path):
  records = six_terms() + [record("g", "mother", "gender")]
  data = stereoset_file(tmp_path / "s.json", records)
  path = tmp_path / "split.json"
  path.write_text(json.dumps({"domains": {
    "profession": {"train": ["term 0", "term 1"], "valid": ["term 2", "term 3"], "test": ["term 4", "term 5"]},
    "gender": {"train": ["mother"], "valid": [], "test": ["sister"]}}}))
  assert message(sources.load, str(data), str(path)) == (
    f"{path}: the test split of gender is empty: none of its 1 terms is in the data.")


def test_the_triples_of_some_bias_types_alone():
  whole = sources.load("builtin")
  some = sources.of_domains(whole, ("gender", "religion"))
  for name in sources.SPLITS:
    before, after = getattr(whole, name), getattr(some, name)
    assert after.triples == tuple(t for t in before.triples if t.domain in ("gender", "religion")) != before.triples
    assert after.texts == before.texts
  assert some.fingerprint != whole.fingerprint
  assert "did you mean `gender`" in message(sources.of_domains, whole, ("gendre",))
  genders = sources.of_domains(whole, ("gender",))
  assert message(sources.of_domains, genders, ("race",)) == (
    "data.domains: the train split has no triple about race.")


def test_a_file_that_is_not_there_and_one_that_is_a_folder(tmp_path):
  assert message(sources.load, "bultin") == (
    "`bultin` is neither a file nor a built-in data set; did you mean `builtin`?")
  assert message(sources.load, str(tmp_path)) == f"{tmp_path}/triples.jsonl: there is no such file."
  missing = tmp_path / "no.json"
  assert message(sources.read_split, missing) == f"{missing}: there is no such file."
  assert "has a split of its own" in message(sources.load, "builtin", "split.json")


# Intersentence triples as texts to be trained on.


def both_tasks(path: Path, more: dict | None = None) -> Path:
  """Six terms with a triple of each task; `more` changes the last intersentence record."""
  follows = [record(f"x{i}", f"term {i}", context="It rains.") for i in range(6)]
  for one in follows:
    for sentence in one["sentences"]:
      sentence["sentence"] = f"So it is {sentence['gold_label']}."
  follows[-1] |= more or {}
  path.write_text(json.dumps({"data": {"intrasentence": six_terms(), "intersentence": follows}}))
  return path


def test_a_continuation_is_a_whole_text_whose_answer_is_the_continuation(tmp_path):
  triple = sources.whole(sources.stereoset_continuations(both_tasks(tmp_path / "s.json"))[0])
  assert triple.sentences == tuple(f"It rains. So it is {label}." for label in LABELS)
  assert {text[triple.prefix :] for text in triple.sentences} == {f" So it is {label}." for label in LABELS}


def test_the_tasks_to_train_on_change_the_train_split_alone(tmp_path, toy_built_in):
  path = both_tasks(tmp_path / "s.json")
  intra, inter, both = (sources.load(path, tasks=tasks) for tasks in (
    sources.TASKS[:1], sources.TASKS[1:], sources.TASKS))
  assert intra == sources.load(path) and len(intra.train.triples) == 3
  assert both.train.triples == intra.train.triples + inter.train.triples
  assert both.validation == inter.validation == intra.validation and both.test == inter.test == intra.test
  assert {t.term for t in inter.train.triples} == {t.term for t in intra.train.triples}, "terms are split once"
  assert len({data.fingerprint for data in (intra, inter, both)}) == 3


@pytest.mark.parametrize(("source", "tasks", "said"), [
  ("s.json", ("intersentance",), "StereoSet has no task `intersentance`; did you mean `intersentence`?"),
  ("s.json", (), "data.tasks is empty; name at least one of intrasentence, intersentence."),
  ("builtin", sources.TASKS, "the built-in data has no intersentence triples; give StereoSet's JSON."),
])
def test_tasks_that_cannot_be_trained_on(tmp_path, source, tasks, said):
  path = both_tasks(tmp_path / source)
  assert message(sources.load, source if source == "builtin" else path, None, tasks) == said


def test_a_continuation_of_a_term_in_no_split_is_named(tmp_path):
  path = both_tasks(tmp_path / "s.json", {"target": "term 9"})
  assert message(sources.load, path, None, sources.TASKS) == f"{path}: term `term 9` is in no split."


@needs_stereoset
def test_all_continuations_of_train_terms_are_read(toy_built_in):
  triples = sources.load(DEV, TERM_SPLIT, sources.TASKS).train.triples
  continuations = [t for t in triples if "BLANK" not in t.context]
  assert len(triples) - len(continuations) == 1077
  terms = {t.term for t in triples[:1077]}
  every = sources.stereoset_continuations(DEV)
  assert [t.id for t in continuations] == [t.id for t in every if t.term in terms]
  assert all(t.sentences[0][: t.prefix + 1] == f"{t.context} " for t in continuations)


# The built-in layout.


def test_a_folder_is_read_and_its_fingerprint_follows_its_content(tmp_path):
  data = sources.read_folder(built_in_folder(tmp_path), "toy")
  assert data.name == "toy" and data.validation.texts[0].id == "x1"
  assert data.test.triples[0].sentences == ("Nurses are kind here.", "Nurses are rude here.", "Nurses are green here.")
  assert data.test.triples[0].prefix == len("Nurses are")
  assert re.fullmatch("[0-9a-f]{64}", data.fingerprint)
  assert sources.read_folder(tmp_path, "another name").fingerprint == data.fingerprint
  changed = sources.read_folder(built_in_folder(tmp_path, triple={"unrelated": "blue"}), "toy")
  assert changed.fingerprint != data.fingerprint


@pytest.mark.parametrize(("triple", "said"), [
  ({"context": "BLANK are BLANK"}, "`context` holds BLANK 2 times, once is needed."),
  ({"unrelated": ""}, "`unrelated` is empty."),
  ({"domain": "age"}, "`age` is no domain"),
])
def test_a_faulty_triple_is_named(tmp_path, triple, said):
  line = message(sources.read_folder, built_in_folder(tmp_path, triple=triple), "toy")
  assert line.startswith(f"{tmp_path / 'triples.jsonl'} line 3: {said}")


@pytest.mark.parametrize(("texts", "said"), [
  ({"train": ["x0"], "validation": ["x1"], "test": []}, "id `x2` is in no split."),
  ({"train": ["x0", "x2"], "validation": ["x1"], "test": []}, "the test split is empty."),
  ({"train": ["x0", "x2"], "validation": ["x1"], "test": ["x2"]}, "id `x2` is in two splits, train and test."),
])
def test_texts_are_split_too(tmp_path, texts, said):
  line = message(sources.read_folder, built_in_folder(tmp_path, splits={"texts": texts}), "toy")
  assert line == f"{tmp_path / 'splits.json'}: {said}"


def test_the_built_in_data_is_as_large_as_it_says():
  data = sources.load("builtin")
  splits = (data.train, data.validation, data.test)
  terms = [{triple.term for triple in split.triples} for split in splits]
  assert sum(len(split.triples) for split in splits) >= 320 and sum(map(len, terms)) >= 60
  assert not terms[0] & terms[1] and not terms[0] & terms[2] and not terms[1] & terms[2]
  assert {triple.domain for triple in data.test.triples} == set(sources.DOMAINS)
  assert sum(len(split.texts) for split in splits) >= 300
  assert all(sources.usable_for_training(triple) for triple in data.train.triples)

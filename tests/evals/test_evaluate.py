"""`evaluate` on a tiny model: what it prints and keeps, which data it takes, and that a bad row costs only itself."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxbias import cli
from jaxbias.data import sources
from jaxbias.errors import UserError
from jaxbias.evals import answers, datafiles, registry, run, stereoset
from jaxbias.evals.metrics import Estimate, Result
from jaxbias.evals.task import TokenScores
from tests.train import Workplace, read

pytestmark = pytest.mark.usefixtures("cache")

PAIRS = [("a", "the cat", "the hat", "stereo", "race"), ("b", "a cat sat", "a hat sat", "antistereo", "race"),
         ("c", "he ran", "she ran", "stereo", "gender")]  # fmt: skip
PASSAGES = ["the cat sat on the cat", "a hat is a hat", "one two one two"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Workplace:
  return Workplace.of(tmp_path_factory)


@pytest.fixture
def evaluate(tiny, tmp_path, capsys):
  """evaluate(*arguments) -> (exit code, what was printed, what was said on stderr, the JSON or None)."""

  def call(*arguments: object):
    out = tmp_path / "found" / "out.json"
    out.unlink(missing_ok=True)
    code = cli.main(["evaluate", "--model", str(tiny.folder / "model"), "--out", str(out), *map(str, arguments)])
    printed, said = capsys.readouterr()
    return code, printed, said, read(out) if out.exists() else None

  return call


@pytest.fixture
def pairs(tmp_path):
  path = tmp_path / "pairs.csv"
  lines = [",sent_more,sent_less,stereo_antistereo,bias_type", *(",".join(pair) for pair in PAIRS)]
  path.write_text("\n".join(lines) + "\n")
  return path


@pytest.fixture
def passages(tmp_path):
  path = tmp_path / "passages.jsonl"
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
  return path


def test_the_default_is_stereosets_intrasentence_task_under_both_scorings(evaluate):
  code, printed, _, found = evaluate("--data", "builtin", "--limit", 6)
  names = ["stereoset_intrasentence", "stereoset_intrasentence_sum"]
  assert code == 0 and list(found["benchmarks"]) == names and "the first 6 of 480 examples" in printed
  triples = sources.load("builtin").train.triples[:6]
  scores = found["answers"].pop(names[0])
  assert not found["answers"] and list(scores) == [triple.id for triple in triples]
  for name, scoring in zip(names, ("token_mean", "sum"), strict=True):
    kept = found["benchmarks"][name]
    again = stereoset.reduce(triples, stereoset.sentence_scores(triples, scores, scoring))
    assert kept["estimates"]["overall"]["ss"]["value"] == again.estimates["overall"]["ss"].value
    assert f"{again.estimates['overall']['ss'].value:.2f}" in printed and name in printed
    assert kept["items"]["ss"] == list(again.items["ss"][0]) and kept["ids"] == [triple.id for triple in triples]
    assert (kept["examples"], kept["of"], kept["answers_in"]) == (6, 480, names[0])
    assert kept["subset"] == "the first 6 of 480 examples"


def test_stereoset_pools_both_tasks_of_a_file_and_takes_the_built_in_one(evaluate, tiny, tmp_path):
  code, printed, _, _ = evaluate("--benchmark", "stereoset", "--data", "builtin", "--limit", 4)
  assert code == 0 and "intrasentence" in printed
  content = read(tiny.folder / "stereoset.json")
  record = content["data"]["intrasentence"][0]
  content["data"]["intersentence"] = [record | {"context": "It rains.", "id": "after"}]
  path = tmp_path / "both.json"
  path.write_text(json.dumps(content))
  code, _, _, found = evaluate("--benchmark", "stereoset", "--data", path)
  groups = found["benchmarks"]["stereoset"]["estimates"]
  assert code == 0 and {"overall", "gender", "race", "intrasentence", "intersentence"} <= set(groups)


def test_several_benchmarks_with_data_of_their_own_and_full_provenance(evaluate, pairs, passages):
  code, printed, _, found = evaluate(
    "--benchmark", "crows_pairs,lambada_openai,lambada_standard", "--data", f"crows_pairs={pairs}", "--data",
    f"lambada={passages}", "--dtype", "bfloat16")  # fmt: skip
  assert code == 0 and printed.count("model in bfloat16, 3 examples") == 2  # the two of LAMBADA share a table
  pair_file, lambada = found["benchmarks"]["crows_pairs"], found["benchmarks"]["lambada_standard"]
  assert pair_file["files"] == {str(pairs): hashlib.sha256(pairs.read_bytes()).hexdigest()}
  assert found["dtype"] == "bfloat16" and found["versions"]["jax"] and len(found["tokenizer"]) == 64
  assert len(found["model"]["fingerprint"]) == 64 and found["model"]["parameters"] > 0 and found["command"]
  assert pair_file["metrics"]["ss"] == {"better": "ideal", "ideal": 50.0, "unit": "%"}
  assert pair_file["subset"] is None and pair_file["bos"] == "prefixed_bos" and not found["left_out"]
  assert found["answers"].keys() == {"crows_pairs", "lambada_openai"} and lambada["answers_in"] == "lambada_openai"
  assert set(found["answers"]["lambada_openai"]["p1"][0]) == {"logprob", "greedy", "mean", "std"}
  assert pair_file["items"]["antistereo"][0] is None  # NaN is no JSON: the first pair does not count there


def test_what_the_model_writes_and_the_scorer_that_judges_it(evaluate, passages, tmp_path):
  words = tmp_path / "words.txt"
  words.write_text("cat\n")
  arguments = ("--benchmark", "realtoxicityprompts", "--data", passages, "--limit", 1)
  code, _, _, found = evaluate(*arguments, "--scorer", f"lexicon:{words}")
  record = found["benchmarks"]["realtoxicityprompts"]
  assert code == 0 and record["source"].endswith(f"toxicity by lexicon:{words}")
  assert len(found["answers"]["realtoxicityprompts"]["p1"]) == 25
  code, _, said, _ = evaluate("--data", "builtin", "--scorer", "lexicon")
  assert code == 2 and "--scorer is for what a model writes" in said


def test_embeddings_are_reduced_and_not_kept(evaluate, tmp_path):
  sets = {name: {"examples": texts} for name, texts in
          zip(("targ1", "targ2", "attr1", "attr2"), (["cat", "hat"], ["sat", "bat"], ["red"], ["one"]), strict=True)}
  (tmp_path / "sent-x.jsonl").write_text(json.dumps(sets))
  code, _, _, found = evaluate("--benchmark", "seat", "--data", tmp_path / "sent-x.jsonl")
  assert code == 0 and not found["answers"] and found["benchmarks"]["seat"]["ids"] == ["sent-x"]


# One bad row


def test_a_malformed_row_costs_only_itself(evaluate, pairs):
  _, _, _, whole = evaluate("--benchmark", "crows_pairs", "--data", pairs)
  lines = pairs.read_text().splitlines()
  pairs.write_text("\n".join([*lines[:2], "x,only one more", "y,a,b,sideways,race", *lines[2:]]) + "\n")
  code, printed, said, found = evaluate("--benchmark", "crows_pairs", "--data", pairs)
  assert code == 2 and "2 left out" in printed
  assert f"{pairs} line 3: `sent_less` is missing." in said
  assert f"{pairs} line 4: `stereo_antistereo` is `sideways`, not stereo or antistereo." in said
  assert found["answers"] == whole["answers"] and len(found["left_out"]) == 2
  assert found["benchmarks"]["crows_pairs"]["estimates"] == whole["benchmarks"]["crows_pairs"]["estimates"]


def test_a_file_without_a_good_row_is_refused_by_its_first_bad_one(evaluate, passages):
  passages.write_text('{"text": "word"}\n{"txt": "a b"}\n')
  code, printed, said, found = evaluate("--benchmark", "lambada_openai", "--data", passages)
  assert (code, printed, found) == (2, "", None) and f"{passages} line 1: `text` needs a last word" in said


def test_a_row_past_the_window_is_named_and_the_others_are_scored(evaluate, passages):
  long = "the cat " * 400 + "sat"
  passages.write_text("".join(json.dumps({"text": text}) + "\n" for text in (PASSAGES[0], long, PASSAGES[1])))
  arguments = ("--benchmark", "lambada_openai,crows_pairs", "--data", f"lambada={passages}")
  code, printed, said, found = evaluate("--benchmark", "lambada_openai", "--data", passages)
  assert code == 2 and "1 left out" in printed and str(passages) in said and "p2" in said
  record = found["benchmarks"]["lambada_openai"]
  assert record["ids"] == ["p1", "p3"] and list(record["failed"]) == ["p2"] and record["examples"] == 2
  code, printed, said, found = evaluate(*arguments[:1], "lambada_openai", "--data", passages, "--truncate", "left")
  record = found["benchmarks"]["lambada_openai"]
  assert code == 0 and "1 cut on the left" in printed
  assert (record["truncated"], record["examples"], found["truncate"]) == (1, 3, "left")


def test_a_benchmark_that_fails_does_not_lose_the_next(evaluate, passages, tmp_path):
  prose = tmp_path / "prose.txt"
  prose.write_text("The cat sat.\n" * 40)
  code, printed, said, found = evaluate("--benchmark", "wikitext2_disjoint,lambada_openai", "--data",
                                        f"perplexity={prose}", "--data", f"lambada={passages}")  # fmt: skip
  assert code == 2 and list(found["benchmarks"]) == ["lambada_openai"] and "lambada_openai" in printed
  assert "wikitext2_disjoint: the model can be asked none of the rows" in said and "256" in said


def test_examples_whose_rows_fail_are_left_out_with_all_their_rows(monkeypatch, tiny):
  """A row that several examples share costs them all; rows that change with the examples are asked again."""
  task = registry.get("stereoset_intersentence_pmi")
  triples = [stereoset.Triple(f"t{i}", "gender", f"term{i}", "It rains.", ("a b", "c d", "e f"), 0) for i in range(3)]
  asked = []

  def answer(model, rows, ask, **how):
    asked.append([row.id for row in rows])
    good = {row.id: [(-1.0, 2), (-2.0, 2), (-3.0, 2)] for row in rows if row.id != "t1 without context"}
    return answers.Answers(good, {"t1 without context": "too long."}, 0, (), 0.0)

  monkeypatch.setattr(answers, "answer", answer)
  tracker = SimpleNamespace(phase=lambda *_: None, advance=None)
  measured = run.Measured(task, "file", triples, 3, run.fields.Reading())
  run.Asker(SimpleNamespace(), None, tracker).measure(measured)
  assert [triple.id for triple in measured.kept] == ["t0", "t2"] and len(asked) == 1
  assert measured.refused == ["file: row t1 without context: too long."]
  assert measured.result.items["ss"].shape == (1, 2)


# Which data


def test_sources_by_benchmark_by_file_and_for_all(tmp_path, monkeypatch):
  names = ["bbq", "bbq_pmi", "seat"]
  assert datafiles.sources(names, ["x"]) == dict.fromkeys(names, "x")
  assert datafiles.sources(names, ["bbq=x", "seat=y"]) == {"bbq": "x", "bbq_pmi": "x", "seat": "y"}
  assert datafiles.sources(names, ["bbq=x", "z", "bbq_pmi=y"]) == {"bbq": "x", "bbq_pmi": "y", "seat": "z"}
  assert datafiles.sources(["bbq"], ["/a=b/c.json"]) == {"bbq": "/a=b/c.json"}
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a=b.json").touch()
  assert datafiles.sources(["bbq"], ["a=b.json"]) == {"bbq": "a=b.json"}


@pytest.mark.parametrize("given, said", [
  (["bbq=x"], "there is no --data for `seat`; add --data seat=PATH."),
  (["bqb=x", "seat=y"], "`bqb` is not among the benchmarks asked for; did you mean `bbq`?"),
  (["x", "y"], "--data gives 2 sources for the same benchmarks"),
])  # fmt: skip
def test_sources_that_are_missing_or_too_many(given, said):
  with pytest.raises(UserError, match=said.replace("?", r"\?")):
    datafiles.sources(["bbq", "seat"], given)


def test_hugging_face_rows_score_like_the_file(evaluate, pairs, tmp_path):
  datasets = pytest.importorskip("datasets")
  kinds = datasets.Features({
    "id": datasets.Value("int32"), "sent_more": datasets.Value("string"), "sent_less": datasets.Value("string"),
    "stereo_antistereo": datasets.ClassLabel(names=["stereo", "antistereo"]),
    "bias_type": datasets.ClassLabel(names=["race", "gender"]),
  })  # fmt: skip
  rows = [{"id": i, "sent_more": more, "sent_less": less, "stereo_antistereo": way, "bias_type": kind}
          for i, (_, more, less, way, kind) in enumerate(PAIRS)]  # fmt: skip
  part = datasets.Dataset.from_list(rows, features=kinds)
  datasets.DatasetDict(test=part, more=part).save_to_disk(tmp_path / "hub")
  (tmp_path / "plain").mkdir()
  part.to_json(tmp_path / "plain" / "test.jsonl")
  _, _, _, local = evaluate("--benchmark", "crows_pairs", "--data", pairs)
  code, _, _, found = evaluate("--benchmark", "crows_pairs", "--data", f"hf:{tmp_path / 'hub'}::test")
  one, other = (record["benchmarks"]["crows_pairs"] for record in (local, found))
  assert code == 0 and one["items"] == other["items"] and one["estimates"] == other["estimates"]
  assert other["data"] == f"hf:{tmp_path / 'hub'}::test" and len(other["files"]) == 1
  assert "name a split" in evaluate("--benchmark", "crows_pairs", "--data", f"hf:{tmp_path / 'hub'}")[2]
  assert "did you mean `test`?" in evaluate("--benchmark", "crows_pairs", "--data", f"hf:{tmp_path / 'hub'}::tst")[2]
  assert "cannot be read" in evaluate("--benchmark", "crows_pairs", "--data", f"hf:{tmp_path / 'nowhere'}")[2]


def test_stereoset_and_truthfulqa_as_hugging_face_has_them(tmp_path, tiny):
  record = read(tiny.folder / "stereoset.json")["data"]["intrasentence"][0]
  lists = {"sentence": [s["sentence"] for s in record["sentences"]],
           "gold_label": [s["gold_label"] for s in record["sentences"]]}  # fmt: skip
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(record | {"sentences": lists} | more) + "\n" for more in (
    {}, {"id": "after", "context": "It rains."})))
  as_json = tmp_path / "rows.json"
  as_json.write_text(json.dumps({"data": {"intrasentence": [record]}}))
  load = lambda name: registry.get(name).load
  assert load("stereoset_intrasentence")(str(path)) == load("stereoset_intrasentence")(str(as_json))
  assert [triple.id for triple in load("stereoset_intersentence")(str(path))] == ["after"]
  answers_of = {"right": 1, "wrong": 0, "also wrong": 0}
  question = {"question": "Why?", "mc1_targets": answers_of, "mc2_targets": answers_of}
  as_json.write_text(json.dumps([question]))
  as_lists = {"choices": list(answers_of), "labels": list(answers_of.values())}
  path.write_text(json.dumps(question | {"mc1_targets": as_lists, "mc2_targets": as_lists}))
  asked = load("truthfulqa_mc_zero_shot")
  assert asked(str(path)) == asked(str(as_json))


def test_a_package_that_is_not_there(evaluate, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
  said = evaluate("--benchmark", "crows_pairs", "--data", "tfds:crows")[2]
  assert "needs tensorflow-datasets" in said and "pip install tensorflow-datasets" in said


# What is refused


@pytest.mark.parametrize("arguments, said", [
  (["--data", "builtin", "--benchmark", "stereosett"], "did you mean `stereoset`?"),
  (["--benchmark", "bbq"], "name what `bbq` is to read with --data"),
  (["--data", "builtin", "--limit", "0"], "--limit=0 leaves no example"),
  (["--data", "builtin", "--truncate", "right"], "invalid choice: 'right'"),
  (["--data", "builtin", "--benchmark", "bbq"], "there is no built-in data for `bbq`; it reads: A folder of BBQ's"),
  (["--data", "builtin", "--benchmark", "stereoset_intersentence"], "the built-in data has no intersentence triples"),
  (["--data", "builtin", "--benchmark", "stereoset_intrasentence_masked"],
   "`stereoset_intrasentence_masked` is for masked language models, and model is a causal one; causal models have "
   "stereoset_intrasentence, "),
])  # fmt: skip
def test_refused(evaluate, arguments, said):
  code, printed, err, found = evaluate(*arguments)
  assert (code, printed, found) == (2, "", None) and said in err and err.count("\n") == 1


def test_a_causal_benchmark_with_a_masked_model():
  masked = SimpleNamespace(name="m", config=SimpleNamespace(causal=False))
  with pytest.raises(UserError, match="for causal language models, and m is a masked one; masked models have crows_"):
    run._check(registry.get("crows_pairs"), masked)
  run._check(registry.get("seat"), masked)


def test_json_has_no_nan():
  estimate = Estimate(np.float64("nan"), None, float("inf"), (1.0,))
  found = Result({"overall": {"x": estimate}}, {"a": np.array([[np.nan, 1]])})
  plain = run._plain({"r": found, "t": [TokenScores(*[np.ones(2)] * 4)], "n": np.int64(3)})
  assert json.loads(json.dumps(plain, allow_nan=False))["r"]["items"] == {"a": [None, 1.0]}
  assert plain["r"]["estimates"]["overall"]["x"] == {"value": None, "low": None, "high": None, "per_seed": [1.0]}


def test_a_long_list_of_faults_is_cut():
  said = str(run.failure([f"fault {i}" for i in range(30)], None))
  assert said.count("\n") == run.MOST + 1 and "30 rows" in said and said.endswith("and 10 more.")

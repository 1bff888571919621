"""The built-in data set: its shape, its splits, and that it copies no benchmark sentence. Reads the files directly."""

import collections
import hashlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "jaxbias" / "data" / "builtin"
STEREOSET = ROOT.parent / "shared" / "data" / "stereoset" / "dev.json"

FILLINGS = ("stereotype", "anti-stereotype", "unrelated")
TERMS = {"gender": 20, "profession": 24, "race": 24, "religion": 12}
TERM_SIZES = {"gender": (10, 4), "profession": (12, 5), "race": (12, 5), "religion": (6, 2)}  # train, validation
TEXT_SIZES = (220, 80)
DEMOGRAPHIC = """man men woman women boy girl mother father brother sister husband wife lady gentleman guy he she him
  her hers his people person human child children worker king queen black white asian african american european english
  french chinese indian jewish muslim christian hindu buddhist catholic church god"""


def read_lines(name: str) -> list[dict]:
  return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


TRIPLES, TEXTS = read_lines("triples.jsonl"), read_lines("texts.jsonl")
SPLITS = json.loads((FOLDER / "splits.json").read_text(encoding="utf-8"))


def sentences(row: dict) -> list[str]:
  return [row["context"].replace("BLANK", row[key]) for key in FILLINGS]


def terms_of(domain: str) -> set[str]:
  return {row["term"] for row in TRIPLES if row["domain"] == domain}


def mentions(text: str, word: str) -> bool:
  return re.search(rf"\b{re.escape(word)}s?\b", text, re.IGNORECASE) is not None


def by_hash(domain: str, names) -> list[str]:
  return sorted(names, key=lambda name: hashlib.sha256(f"jaxbias-builtin-v1|{domain}|{name}".encode()).hexdigest())


def cut(names: list[str], train: int, validation: int) -> dict[str, list[str]]:
  return {"train": names[:train], "validation": names[train : train + validation], "test": names[train + validation :]}


def test_counts():
  assert len(TRIPLES) == 480 and len(TEXTS) == 420
  assert {domain: len(terms_of(domain)) for domain in TERMS} == TERMS
  assert sum(TERMS.values()) >= 60
  assert set(collections.Counter((row["domain"], row["term"]) for row in TRIPLES).values()) == {6}


def test_every_row_has_the_documented_fields_and_id():
  for row in TRIPLES:
    assert list(row) == ["id", "domain", "term", "context", *FILLINGS]
    slug = re.sub(r"[^a-z]+", "-", row["term"].lower().replace("'", ""))
    assert re.fullmatch(rf"{row['domain']}-{slug}-[1-6]", row["id"])
  for number, row in enumerate(TEXTS, start=1):
    assert list(row) == ["id", "text"] and row["id"] == f"fact-{number:03d}"


def test_ids_and_sentences_are_unique():
  ids = [row["id"] for row in TRIPLES + TEXTS]
  everything = [s.casefold() for row in TRIPLES for s in sentences(row)] + [row["text"].casefold() for row in TEXTS]
  assert len(set(ids)) == len(ids)
  assert len(set(everything)) == len(everything)


def test_blank_stands_once_and_free_after_the_term():
  for row in TRIPLES:
    context = row["context"]
    assert context.count("BLANK") == 1, context
    assert re.search(r"(?<= )BLANK(?=[ .,;:?!])", context), context
    term = re.search(rf"\b{re.escape(row['term'])}\b", context, re.IGNORECASE)
    assert term and term.end() < context.index("BLANK"), context
    assert 6 <= len(context.split()) <= 16, context


def test_fillings_are_comparable():
  equal = 0
  for row in TRIPLES:
    fillings = [row[key] for key in FILLINGS]
    assert len({f.casefold() for f in fillings}) == 3, row["id"]
    assert all(f and f == " ".join(f.split()) and len(f.split()) <= 3 for f in fillings), row["id"]
    words = [len(f.split()) for f in fillings]
    assert abs(words[0] - words[1]) <= 1, row["id"]
    equal += words[0] == words[1]
  assert equal >= 0.8 * len(TRIPLES)


def test_a_and_an_agree_with_all_three_fillings():
  for row in TRIPLES:
    article = re.search(r"\b(an?) BLANK", row["context"], re.IGNORECASE)
    if article:
      vowels = {row[key][0].lower() in "aeiou" for key in FILLINGS}
      assert vowels == {article.group(1).lower() == "an"}, row["id"]


def test_no_filling_and_no_frame_is_worn_out():
  anti = collections.Counter(row["anti-stereotype"].casefold() for row in TRIPLES)
  frames = collections.Counter(
    re.sub(rf"\b{re.escape(row['term'].casefold())}\b", "TERM", row["context"].casefold()) for row in TRIPLES
  )
  assert max(anti.values()) <= 4
  assert max(frames.values()) <= 3


def test_a_row_names_no_target_term_but_its_own():
  """Else a sentence of the training split could teach about a term of the test split. Plurals count."""
  every = {row["term"] for row in TRIPLES}
  for row in TRIPLES:
    # "black" the color and "Black" the term differ by the capital; common nouns are compared without case.
    flags = {term: 0 if term[0].isupper() else re.IGNORECASE for term in every - {row["term"]}}
    text = " ".join(sentences(row))
    assert not [t for t, flag in flags.items() if re.search(rf"\b{re.escape(t)}s?\b", text, flag)], row["id"]


@pytest.mark.parametrize("domain", TERMS)
def test_term_splits_partition_and_follow_the_rule(domain):
  split = SPLITS["triples"][domain]
  assert split == cut(by_hash(domain, terms_of(domain)), *TERM_SIZES[domain])
  listed = [term for terms in split.values() for term in terms]
  assert len(listed) == len(set(listed)) and set(listed) == terms_of(domain)


def test_text_splits_partition_and_follow_the_rule():
  ids = [row["id"] for row in TEXTS]
  assert SPLITS["texts"] == cut(by_hash("text", ids), *TEXT_SIZES)
  assert sorted(i for part in SPLITS["texts"].values() for i in part) == sorted(ids)


def test_split_sizes_over_all_domains():
  assert "sha256" in SPLITS["rule"] and set(SPLITS["triples"]) == set(TERMS)
  sizes = {s: sum(len(split[s]) for split in SPLITS["triples"].values()) for s in ("train", "validation", "test")}
  assert sizes == {"train": 40, "validation": 16, "test": 24}
  assert {name: len(ids) for name, ids in SPLITS["texts"].items()} == {"train": 220, "validation": 80, "test": 120}


def test_no_term_is_in_two_splits_even_across_domains():
  where = collections.defaultdict(set)
  for split in SPLITS["triples"].values():
    for name, terms in split.items():
      for term in terms:
        where[term.casefold()].add(name)
  assert all(len(names) == 1 for names in where.values())


def test_texts_are_neutral_sentences():
  words = {row["term"] for row in TRIPLES} | set(DEMOGRAPHIC.split())
  for row in TEXTS:
    assert 10 <= len(row["text"].split()) <= 20 and row["text"].endswith("."), row["id"]
    assert not [word for word in words if mentions(row["text"], word)], row["id"]


def test_texts_are_not_near_duplicates():
  bags = [set(re.findall(r"[a-z]{4,}", row["text"].lower())) for row in TEXTS]
  for i, bag in enumerate(bags):
    for j in range(i):
      assert len(bag & bags[j]) < 0.6 * len(bag | bags[j]), (TEXTS[j]["text"], TEXTS[i]["text"])


@pytest.mark.skipif(not STEREOSET.exists(), reason=f"needs the benchmark to compare with: {STEREOSET} is absent")
def test_no_sentence_is_copied_from_stereoset():
  benchmark = json.loads(STEREOSET.read_text(encoding="utf-8"))["data"]
  theirs = {example["context"].casefold() for task in benchmark.values() for example in task}
  theirs |= {s["sentence"].casefold() for task in benchmark.values() for example in task for s in example["sentences"]}
  ours = {s.casefold() for row in TRIPLES for s in [row["context"], *sentences(row)]}
  ours |= {row["text"].casefold() for row in TEXTS}
  bare = str.maketrans("", "", ".!?")
  assert len(theirs) > 4000
  assert not {s.translate(bare).strip() for s in ours} & {s.translate(bare).strip() for s in theirs}

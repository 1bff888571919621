"""Bias and forgetting of one model on one split: the two scoring passes behind a row of the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxbias.data.rows import Choice, Split
from jaxbias.data.sources import triple_choices
from jaxbias.evals import forgetting, stereoset
from jaxbias.evals.metrics import Estimate, Scores
from jaxbias.evals.scoring import Encoded, encode, score
from jaxbias.models.language_model import LanguageModel

METRICS = {  # the columns of the table: label, unit, ideal, which way is better, what it means
  "ss": ("SS", "%", 50.0, "ideal", "stereotype score: how often the stereotype is likelier than the anti-stereotype"),
  "lms": ("LMS", "%", 100.0, "higher", "language-modelling score: how often a meaningful filling beats the unrelated"),
  "icat": ("ICAT", "%", 100.0, "higher", "LMS x min(SS, 100 - SS) / 50: both at once"),
  "f_all": ("F_all", "nats/token", 0.0, "lower", "overall forgetting: rise of the loss on general text"),
  "f_st": ("F_st", "nats/token", None, "none", "forgetting of stereotypes: rise of the loss on them"),
  "f_anti": ("F_anti", "nats/token", None, "none", "rise of the loss on anti-stereotypes"),
  "f_unrel": ("F_unrel", "nats/token", 0.0, "ideal", "rise of the loss on unrelated fillings"),
  "f_sel": ("F_sel", "nats/token", None, "higher", "selective forgetting: F_st - F_unrel; read it beside F_all"),
  "preference_shift": ("shift", "nats/token", None, "none", "preference shift: F_st - F_anti"),
}  # fmt: skip


def encode_split(model: LanguageModel, split: Split) -> dict[str, Encoded]:
  """The rows of both passes, tokenised once for all models of a comparison."""
  rows = {"triples": triple_choices(split.triples), "texts": [Choice(t.id, "", (t.text,)) for t in split.texts]}
  return {name: encode(members, model.tokenizer, model.config.max_positions) for name, members in rows.items()}


def measure(
  model: LanguageModel,
  encoded: Mapping[str, Encoded],
  adapters: Mapping,
  advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, Scores]:
  """{"triples": scores, "texts": scores}: everything that any metric of the table is computed from."""
  return {name: score(model, rows, adapters, advance) for name, rows in encoded.items()}


def estimates(
  split: Split, base: Mapping[str, Scores], trained: Sequence[Mapping[str, Scores]], scoring: str, draws: int
) -> tuple[dict[str, Estimate], dict[str, dict[str, Estimate]]]:
  """Overall estimates of METRICS, and StereoSet's per domain, over the seeds in `trained`."""
  losses = [forgetting.Losses.of(split.texts, split.triples, m["texts"], m["triples"]) for m in (base, *trained)]
  forgot = forgetting.reduce(split.triples, losses[0], losses[1:], draws=draws).estimates["overall"]
  sentence_scores = [stereoset.sentence_scores(split.triples, m["triples"], scoring) for m in trained]
  bias = stereoset.reduce(split.triples, sentence_scores, draws=draws).estimates
  overall = {name: ({**bias["overall"], **forgot})[name] for name in METRICS}
  return overall, {domain: found for domain, found in bias.items() if domain != "overall"}

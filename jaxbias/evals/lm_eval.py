"""jaxbias models for EleutherAI's lm-evaluation-harness: its tasks, prompts and metrics, our forward pass.

  python -m jaxbias.evals.lm_eval run --model jaxbias --model_args pretrained=smollm2-135m-instruct --tasks piqa

is the harness' own command line with this model class registered; `lm_eval.simple_evaluate(model=JaxbiasLM(...))` is
the same from Python. Texts become tokens by the harness' conventions, not by those of `evals/answers.py`: context and
continuation are tokenised together and cut at the context's length, spaces at the context's end move behind the cut,
the tokenizer adds the special tokens that it adds by itself, and texts past the window lose tokens on their left.
Requests that share a context are read together. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from jaxbias.data.pipeline import choice_segment
from jaxbias.errors import UserError
from jaxbias.evals import passes
from jaxbias.evals.generate import generate
from jaxbias.evals.sampling import Sampling
from jaxbias.models import language_model
from jaxbias.models.language_model import LanguageModel
from jaxbias.progress import Tracker

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@register_model("jaxbias")
class JaxbiasLM(TemplateLM):
  """pretrained: a model, or any source that `--model` takes. max_length: positions, the model's own by default.

  add_bos_token: whether texts begin with the tokenizer's special tokens; None leaves it to the tokenizer.
  batch_size and device are accepted and not used: packing decides, and JAX has all devices.
  """

  def __init__(self, pretrained: str | LanguageModel, dtype: str | None = None, max_length: int | None = None,
               max_gen_toks: int = 256, add_bos_token: bool | None = None, prefix_token_id: int | None = None,
               seed: int = 0, batch_size: Any = None, max_batch_size: Any = None, device: Any = None):
    super().__init__()
    model = language_model.load(pretrained, dtype) if isinstance(pretrained, str) else pretrained
    if not model.config.causal:
      raise UserError(f"{model.name} is a masked language model; lm-evaluation-harness asks causal ones.")
    self.model, self.seed, self.max_gen_toks, self.add_bos_token = model, int(seed), int(max_gen_toks), add_bos_token
    self.max_length = min(int(max_length or model.config.max_positions), model.config.max_positions)
    self._prefix = prefix_token_id

  @property
  def eot_token_id(self) -> int:
    eos = self.model.tokenizer.eos_id
    return self.model.tokenizer.start_id if eos is None else eos

  @property
  def prefix_token_id(self) -> int:
    return self.model.tokenizer.start_id if self._prefix is None else int(self._prefix)

  @property
  def tokenizer_name(self) -> str:
    return self.model.tokenizer.fingerprint

  def get_model_info(self) -> dict:
    model = self.model
    return {"model_num_parameters": model.num_parameters, "model_dtype": model.config.dtype,
            "model_sha": model.fingerprint, "tokenizer_sha": model.tokenizer.fingerprint}  # fmt: skip

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    special = self.add_bos_token if add_special_tokens is None else add_special_tokens
    if add_special_tokens is None and has_bos_prefix(string, self.model.tokenizer.decode([self.prefix_token_id])):
      special = False
    return self.model.tokenizer.backend.encode(string, add_special_tokens=special is not False).ids

  def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                            **_) -> list[tuple[float, bool]]:
    if not requests:
      return []
    scored = [self._window(context, option) for _, context, option in requests]
    # Tables of LongRoPE depend on a text's length, so texts of different lengths cannot share a context there.
    apart = any(rope.long_inverse is not None for rope in self.model.config.ropes)
    groups: dict[tuple, dict[tuple, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for i, (context, option) in enumerate(scored):
      groups[context, len(option) if apart else 0][option].append(i)
    made = [choice_segment(list(context), [list(option) for option in options])
            for (context, _), options in groups.items()]
    segments = [segment for segment, _ in made]
    with Tracker("loglikelihood", 1.0) as tracker:
      tracker.phase("loglikelihood", len(segments), 1.0)
      advance = (lambda done: None) if disable_tqdm else tracker.advance
      (logprob, greedy, *_), _ = passes.read(self.model, segments, passes.STATISTICS, advance=advance)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    first = np.cumsum([0, *(len(segment.target) for segment in segments)])
    for begin, (_, parts), options in zip(first, made, groups.values(), strict=False):
      for part, members in zip(parts, options.values(), strict=True):
        at = begin + np.asarray(part)
        for i in members:
          found[i] = (float(logprob[at].sum(dtype=np.float64)), bool(greedy[at].all()))
    for (arguments, *_), answer in zip(requests, found, strict=True):
      if arguments is not None:
        self.cache_hook.add_partial("loglikelihood", arguments, answer)
    return found

  def _window(self, context: Sequence[int], option: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both as they fit: the last token is not read, so there is one more than positions."""
    if not 0 < len(option) <= self.max_length:
      raise UserError(f"a continuation has {len(option)} tokens; 1 to {self.max_length} can be scored.")
    return tuple([*context, *option][-(self.max_length + 1) : -len(option)]), tuple(option)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    windows = []
    for i, (text,) in enumerate(request.args for request in requests):
      rolling = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
      windows += [(i, *utils.make_disjoint_window(window)) for window in rolling]
    found = self._loglikelihood_tokens([(None, *window) for _, *window in windows], disable_tqdm)
    total = [0.0] * len(requests)
    for (i, *_), (logprob, _) in zip(windows, found, strict=True):
      total[i] += logprob
    for request, value in zip(requests, total, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
    return total

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    asked = [self._prompt(context, settings) for context, settings in (request.args for request in requests)]
    with Tracker("generate", 1.0) as tracker:
      tracker.phase("generate", len(asked), 1.0)
      advance = (lambda done: None) if disable_tqdm else tracker.advance
      written = generate(self.model, [prompt for prompt, _ in asked], [sampling for _, sampling in asked],
                         advance=advance)  # fmt: skip
    decode = lambda tokens: self.model.tokenizer.backend.decode(list(tokens), skip_special_tokens=True)
    texts = [postprocess_generated_text(decode(one.tokens), list(sampling.stop), None)
             for one, (_, sampling) in zip(written, asked, strict=True)]
    for request, text in zip(requests, texts, strict=True):
      self.cache_hook.add_partial("generate_until", request.args, text)
    return texts

  def _prompt(self, context: str, settings: Mapping) -> tuple[list[int], Sampling]:
    given = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
    until, tokens, _ = given.pop("until", None) or [], given.pop("max_gen_toks"), given.pop("do_sample", None)
    if unknown := given.keys() - set(SAMPLING):
      raise UserError(f"generation with `{sorted(unknown)[0]}` is not supported; settings are until, max_gen_toks, "
                      f"do_sample, {', '.join(SAMPLING)}.")
    if tokens >= self.max_length:
      raise UserError(f"{tokens} new tokens are asked for; the model has {self.max_length} positions.")
    stop = [until] if isinstance(until, str) else until
    ids = self.tok_encode(context)[-(self.max_length - tokens) :] or [self.prefix_token_id]
    return ids, Sampling(max_tokens=tokens, stop=tuple(filter(None, stop)), seed=self.seed, **given)


if __name__ == "__main__":
  from lm_eval.__main__ import cli_evaluate

  cli_evaluate()

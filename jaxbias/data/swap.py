"""Counterfactual texts: every gendered word exchanged for its partner, and the corpora that are made of them.

The list is one-to-one, letter case is kept, and the pronouns that English folds together are told apart by the words
beside them: as (word, role) the map is its own inverse,

  him, object <-> her, object      his, before a noun <-> her, before a noun      his, alone <-> hers, alone

though a text's way back can differ where the rule errs. `her` (and `his`) stands alone when nothing, punctuation, or a
word that opens no noun phrase follows it; docs/diagnosis.md has its error rates.

`legacy` is what common scripts do (bias-bench, Meade et al. 2022): words between spaces, lower case only, with at most
one punctuation mark behind; of two pairs with a common word the later one wins, so that swapping is no involution.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxbias.data.fields import File, field, json_file
from jaxbias.errors import UserError

Pairs = tuple[tuple[str, str], ...]  # (male, female), lower case

PAIRS: Pairs = tuple(tuple(pair.split("/")) for pair in """
  he/she himself/herself man/woman men/women boy/girl boys/girls male/female males/females guy/gal guys/gals lad/lass
  lads/lasses gentleman/lady gentlemen/ladies sir/madam mr/mrs father/mother fathers/mothers dad/mom dads/moms
  daddy/mommy papa/mama son/daughter sons/daughters brother/sister brothers/sisters husband/wife husbands/wives
  uncle/aunt uncles/aunts nephew/niece nephews/nieces grandfather/grandmother grandfathers/grandmothers
  grandpa/grandma grandson/granddaughter grandsons/granddaughters stepfather/stepmother stepson/stepdaughter
  stepbrother/stepsister godfather/godmother godson/goddaughter widower/widow widowers/widows groom/bride
  grooms/brides boyfriend/girlfriend boyfriends/girlfriends fiance/fiancee fatherhood/motherhood fatherly/motherly
  paternal/maternal brotherhood/sisterhood brotherly/sisterly manhood/womanhood boyhood/girlhood masculine/feminine
  masculinity/femininity king/queen kings/queens prince/princess princes/princesses duke/duchess dukes/duchesses
  baron/baroness count/countess emperor/empress emperors/empresses nobleman/noblewoman monk/nun monks/nuns
  wizard/witch wizards/witches hero/heroine heroes/heroines heir/heiress heirs/heiresses actor/actress
  actors/actresses waiter/waitress waiters/waitresses host/hostess steward/stewardess landlord/landlady
  policeman/policewoman policemen/policewomen fireman/firewoman firemen/firewomen businessman/businesswoman
  businessmen/businesswomen salesman/saleswoman salesmen/saleswomen spokesman/spokeswoman spokesmen/spokeswomen
  chairman/chairwoman chairmen/chairwomen congressman/congresswoman sportsman/sportswoman sportsmen/sportswomen
  cowboy/cowgirl cowboys/cowgirls schoolboy/schoolgirl schoolboys/schoolgirls
""".split())
PRONOUNS: dict[tuple[str, str], str] = {  # (word, role) -> its partner
  ("him", "object"): "her", ("her", "object"): "him",
  ("his", "noun"): "her", ("her", "noun"): "his",
  ("his", "alone"): "hers", ("hers", "alone"): "his",
}  # fmt: skip
UNPAIRED = frozenset(["ms", "miss", "misses", "ma'am", "lord", "lords"])  # gendered, without a partner of their own
STEREOTYPED: dict[str, str] = {word: side for side, words in {  # occupations, and the gender that people expect of them
  "male": """doctor engineer pilot carpenter mechanic plumber farmer lawyer scientist programmer architect judge surgeon
    builder soldier guard electrician banker sailor miner butcher driver manager professor""",
  "female": """nurse secretary teacher cleaner librarian receptionist hairdresser dancer housekeeper nanny florist
    dietitian tailor babysitter midwife cashier assistant stylist therapist baker cook clerk typist singer""",
}.items() for word in words.split()}  # fmt: skip

_WORD = re.compile(r"[Mm][Aa]'[Aa][Mm]|[A-Za-z]+")
_BESIDE = re.compile(r"""\s+["“‘']?""")  # what may be between a pronoun and its neighbour
_NUMBER = re.compile(r"\s+\d")  # stands for a noun phrase
_MARKS = ".,?!;:"
# What follows a pronoun that no noun follows: function words, and adverbs that close a clause.
_NO_NOUN = frozenset("""
  about above across after against along amid among around as at before behind below beneath beside besides between
  beyond by down during except for from in inside into like near of off on onto out outside over regarding since
  through throughout till to toward towards under until up upon via with within without
  and or but nor so yet because although though while when whenever where wherever if unless than that whether who whom
  whose which what how why
  a an the this these those some any every each no all both another enough such something anything nothing everything
  it its i you he she they we me us them him his her hers their my your our himself herself itself themselves myself
  not never often again twice away here there now once too also even ever just still well quite thus alone together
  altogether entirely anyway instead soon today tomorrow tonight yesterday afterwards afterward forever everywhere
  is are was were be been am has have had do does did would shall should can could may might must
  go come know feel look stay see sit stand take get make give find speak say tell understand
""".split())
_AMBIGUOUS = ("ly", "ing")  # endings of what may open a noun phrase, and does unless a verb of `_OBJECT_OF` leads
_OBJECT_OF = frozenset("""
  let lets letting make makes made making help helps helped see sees saw seen seeing hear hears heard hearing watch
  watched watching keep keeps kept find finds found leave leaves left feel felt
  tell tells told telling ask asks asked asking give gives gave given giving
""".split())


class Found(NamedTuple):
  """A gendered word of a text: its characters, whether it is "male" or "female", and its partner in lower case."""

  start: int
  end: int
  side: str
  partner: str


def role(word: str, before: str, after: str) -> str:
  """Of a pronoun: "object", "noun" (one follows), "alone", or "" for other words. All lower case; `before` and
  `after` are the neighbouring words, "" where punctuation or nothing is."""
  if word in ("him", "hers"):
    return "object" if word == "him" else "alone"
  if word not in ("her", "his"):
    return ""
  if after and after not in _NO_NOUN and not (before in _OBJECT_OF and after.endswith(_AMBIGUOUS)):
    return "noun"
  return "object" if word == "her" else "alone"


@dataclasses.dataclass(frozen=True)
class Swapper:
  """`swapper(text)` is the text with every gendered word exchanged. Raises UserError for pairs that share a word, which
  only `legacy` can use."""

  pairs: Pairs = PAIRS
  legacy: bool = False

  def __post_init__(self):
    counts = collections.Counter(word for pair in self.pairs for word in pair)
    word, most = counts.most_common(1)[0] if counts else ("", 0)
    if most > 1 and not self.legacy:
      raise UserError(f"`{word}` is in {most} pairs; keep one of them (him, his, her and hers need none), or ask for "
                      "the legacy swap.")  # fmt: skip

  @functools.cached_property
  def partners(self) -> dict[str, str]:
    """Word -> partner; in legacy with each punctuation mark behind, too. The later pair wins."""
    marks = ("", *_MARKS) if self.legacy else ("",)
    both = ((m + mark, f + mark) for m, f in self.pairs for mark in marks)
    return {word: partner for m, f in both for word, partner in ((m, f), (f, m))}

  @functools.cached_property
  def _male(self) -> frozenset[str]:
    return frozenset({male for male, _ in self.pairs} | {"him", "his"})

  def found(self, text: str) -> list[Found]:
    """The gendered words of a text, in its order."""
    return list(self._found_legacy(text) if self.legacy else self._found(text))

  def _found_legacy(self, text: str) -> Iterator[Found]:
    for match in re.finditer("[^ ]+", text):
      if partner := self.partners.get(match[0]):
        side = "male" if match[0].rstrip(_MARKS) in self._male or match[0] in self._male else "female"
        yield Found(*match.span(), side, partner)

  def _found(self, text: str) -> Iterator[Found]:
    words = list(_WORD.finditer(text))
    for i, match in enumerate(words):
      word = match[0].lower()
      partner = self.partners.get(word)
      if word in ("him", "his", "her", "hers"):
        beside = lambda j: words[j][0].lower() if 0 <= j < len(words) else ""
        before = beside(i - 1) if i and _BESIDE.fullmatch(text, words[i - 1].end(), match.start()) else ""
        gap = text[match.end() : words[i + 1].start() if i + 1 < len(words) else len(text)]
        after = beside(i + 1) if _BESIDE.fullmatch(gap) else "0" if _NUMBER.match(gap) else ""
        partner = PRONOUNS[word, role(word, before, after)]
      if partner:
        yield Found(*match.span(), "male" if word in self._male else "female", partner)

  def __call__(self, text: str) -> str:
    pieces, at = [], 0
    for start, end, _, partner in self.found(text):
      pieces += [text[at:start], partner if self.legacy else _as_cased(text[start:end], partner)]
      at = end
    return "".join([*pieces, text[at:]])


def _as_cased(word: str, partner: str) -> str:
  if word.isupper() and len(word) > 1:
    return partner.upper()
  return partner.capitalize() if word[0].isupper() else partner


def read_pairs(path: File) -> Pairs:
  """{"gender": [[male, female], ...]}, as in bias-bench's bias_attribute_words.json."""
  pairs = field(json_file(path), "gender", list, path)
  for i, pair in enumerate(pairs):
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair)):
      raise UserError(f"{path}: gender[{i}] has to be two words.")
  return tuple(map(tuple, pairs))

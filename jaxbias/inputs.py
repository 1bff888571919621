"""What a config's `data` section names, as one data set that knows the files it was read from."""

from __future__ import annotations

import collections
import dataclasses

from jaxbias.data import sources
from jaxbias.data.corpora import read_texts, with_pool
from jaxbias.data.fields import noted
from jaxbias.data.groups import read_groups
from jaxbias.data.roles import with_roles
from jaxbias.data.rows import DataSet, Split
from jaxbias.evals import probe as probes


def load_data(chosen, watched: str = "") -> DataSet:
  """What a config's `data` section names. watched: the file of `watch.general`, whose texts no corpus is made of."""
  with noted() as reading:
    data = sources.load(chosen.source, chosen.split_file or None, tuple(chosen.tasks))
    if chosen.domains:
      data = sources.of_domains(data, tuple(chosen.domains))
    if chosen.groups:
      data = dataclasses.replace(data, train=dataclasses.replace(data.train, groups=read_groups(chosen.groups)))
    if any(chosen.roles.values()):
      data = with_roles(data, chosen.roles.to_dict())
    if chosen.corpus:
      general = probes.read_general(watched).texts if watched else ()
      data = with_pool(data, read_texts(chosen.corpus), general)
  own = [use.files for role in data.train.roles.values() for use in role.sources]
  return dataclasses.replace(data, files=dict(collections.ChainMap(reading.files, *own)))


def counts(data: DataSet) -> dict:
  """{split: how many triples, target terms and texts}."""

  def count(split: Split) -> dict:
    terms = len({triple.term for triple in split.triples})
    return {"triples": len(split.triples), "terms": terms, "texts": len(split.texts)}

  return {name: count(getattr(data, name)) for name in ("train", "validation", "test")}

"""Made-up results of a comparison, for the tests of its report."""

from __future__ import annotations

METRICS = {
  "ss": {"label": "SS", "unit": "%", "ideal": 50.0, "better": "ideal", "help": "stereotype score"},
  "lms": {"label": "LMS", "unit": "%", "ideal": 100.0, "better": "higher", "help": "language-modelling score"},
  "f_all": {"label": "F_all", "unit": "nats/token", "ideal": 0.0, "better": "lower", "help": "overall forgetting"},
  "f_st": {"label": "F_st", "unit": "nats/token", "ideal": None, "better": "higher"},
  "pref_shift": {"label": "shift", "unit": "nats/token", "better": "none"},
}
HOSTILE = '<script>alert("x")</script> | **b** [l](x) $a_'


def estimate(value, width, seeds=2):
  return {"value": value, "low": value - width, "high": value + width, "per_seed": [value - 0.3, value + 0.3][:seeds]}


def row(name, label, ss, lms, f_all, f_st, shift, width=1.25):
  domains = {domain: {"ss": estimate(ss + i, 9.0)} for i, domain in enumerate(("gender", "race"))}
  values = {"f_all": f_all, "f_st": f_st, "pref_shift": shift}
  estimates = {"ss": estimate(ss, width), "lms": estimate(lms, 2.0)}
  estimates |= {metric: estimate(value, 0.0 if name == "base" else 0.01) for metric, value in values.items()}
  train = {"seconds": [41.0, 40.2], "tokens": [12345, 12346]}
  losses = {"npo": {"weight": 0.5, "beta": 0.1, "on": "forget"}}
  about = {"train": None} if name == "base" else {"train": train, "losses": losses}
  return {"name": name, "label": label, "estimates": estimates, "domains": domains, **about}


def curve(offset=0.0):
  return [
    {"step": step, "loss": 3.0, "parts": {"npo": 13.9 - step + offset, "kl": 0.1 * step}, "seconds": 1.0}
    for step in range(1, 5)
  ]

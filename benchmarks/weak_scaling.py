"""What a train step sends on 8 to 1,024 chips, and what share of the time that leaves for arithmetic: a prediction.

  python benchmarks/weak_scaling.py                        # the tables of docs/scaling.md, in a second
  python benchmarks/weak_scaling.py --rows 1 --length 2048

The bytes are a closed form of what the partitioner makes of the real step; tests/test_weak_scaling.py holds it to the
plan of a compiled step, to the byte but for scalars. Bandwidths and peaks are the makers'; nothing of this was run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

BF16, F32 = 2, 4
STATE = {"lora": BF16, "full": BF16 + 3 * F32 + F32}  # a weight: frozen; trained copy, two moments, gradient
ADAPTER = 3 * F32 + F32


@dataclasses.dataclass(frozen=True)
class Shape:
  """A Llama with a rank for its adapters on all seven projections. D width, F mlp, V vocabulary."""

  layers: int
  D: int
  F: int
  V: int
  heads: int
  kv_heads: int
  head_dim: int
  tied: bool
  rank: int = 8

  @property
  def projections(self) -> list[tuple[int, int]]:
    """(in, out) of q, k, v, o, gate, up, down."""
    q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
    return [(self.D, q), (self.D, kv), (self.D, kv), (q, self.D), (self.D, self.F), (self.D, self.F), (self.F, self.D)]

  @property
  def matrices(self) -> int:
    """Weights of all layers' projections."""
    return self.layers * sum(a * b for a, b in self.projections)

  @property
  def factors(self) -> int:
    """Parameters of the adapters."""
    return self.layers * sum(self.rank * (a + b) for a, b in self.projections)

  @property
  def parameters(self) -> int:
    return self.matrices + self.V * self.D * (1 if self.tied else 2) + self.D * (2 * self.layers + 1)


MODELS = {
  "1B": Shape(16, 2048, 8192, 128_256, 32, 8, 64, tied=True),
  "8B": Shape(32, 4096, 14_336, 128_256, 32, 8, 128, tied=False),
  "70B": Shape(80, 8192, 28_672, 128_256, 64, 8, 128, tied=False),
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """flops: dense bfloat16 a second. memory, and bandwidths one chip receives with: bytes. `island` chips share the fast
  links; beyond it there is `slow`."""

  flops: float
  memory: float
  fast: float
  island: int
  slow: float


CHIPS = {
  "v5e": Chip(197e12, 16e9, 200e9, 256, 3.125e9),
  "v5p": Chip(459e12, 95 * 2**30, 600e9, 8960, 6.25e9),
  "H100": Chip(989e12, 80e9, 450e9, 8, 50e9),
  "H200": Chip(989e12, 141e9, 450e9, 8, 50e9),
}


def received(m: Shape, mode: str, mesh: str, n: int, rows: int, length: int) -> dict[str, float]:
  """{kind: bytes that a chip takes in during a step}, as rings move them. mesh: all `n` chips in "fsdp" or in "data";
  rows: of `length` tokens, on each chip."""
  ring, full = (n - 1) / n, mode == "full"
  norms = m.D * F32
  if mesh == "data":
    own = m.matrices * BF16 + (2 * m.layers + 1) * norms + m.V * m.D * (BF16 + F32)  # the table is used twice
    return {"all-reduce": 2 * ring * (own if full else m.factors * BF16)}
  cut = m.layers * len(m.projections) * m.D * m.rank * BF16  # the factor of an adapter that lies along D
  gathered = 2 * m.matrices * BF16 + (6 * m.layers + 2) * norms + m.V * m.D * (F32 if full else BF16)
  gathered += n * rows * length * 4 + (0 if full else 2 * cut)  # ids of the tokens
  reduced = m.matrices * BF16 + (2 * m.layers + 1) * norms + m.V * m.D * F32 if full else m.factors * BF16
  looked_up = rows * length * m.D * BF16 * (2 if full else 1)
  return {"all-gather": ring * gathered, "all-reduce": 2 * ring * reduced, "all-to-all": ring * looked_up}


def seconds_of_arithmetic(m: Shape, mode: str, chip: Chip, rows: int, length: int) -> float:
  """At the chip's peak: 4 FLOPs a frozen weight and token, 6 a trained one, and attention scores."""
  tokens, of_weight = rows * length, 6 if mode == "full" else 4
  weights = of_weight * (m.matrices + m.V * m.D) + (0 if mode == "full" else 6 * m.factors)
  return tokens * (weights + 12 * m.layers * m.heads * m.head_dim * length) / chip.flops


def seconds_of_traffic(size: float, chip: Chip, n: int) -> float:
  """The slower of the fast links, and of the slow ones, over which an island takes in once what its chips share."""
  if n <= chip.island:
    return size / chip.fast
  islands = math.ceil(n / chip.island)
  return max(size / chip.fast, size * n / (n - 1) * (islands - 1) / islands / (chip.island * chip.slow))


def state(m: Shape, mode: str, mesh: str, n: int) -> float:
  """Bytes that lie on a chip all the time, activations aside."""
  whole = m.parameters * STATE[mode] + (m.factors * ADAPTER if mode == "lora" else 0)
  return whole / (n if mesh == "fsdp" else 1)


def cell(m: Shape, mode: str, mesh: str, chip: Chip, n: int, rows: int, length: int) -> str:
  """Efficiency in % where arithmetic and traffic take turns, and the tokens on a chip from which traffic could hide
  behind arithmetic; - where the state does not fit."""
  if state(m, mode, mesh, n) > chip.memory:
    return "-"
  work = seconds_of_arithmetic(m, mode, chip, rows, length)
  traffic = seconds_of_traffic(sum(received(m, mode, mesh, n, rows, length).values()), chip, n)
  return f"{100 * work / (work + traffic):.0f}, {math.ceil(rows * length * traffic / work):,}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=4, help="on each chip; default 4")
  parser.add_argument("--length", type=int, default=1024, help="tokens of a row; default 1024")
  options = parser.parse_args()
  for mode in ("lora", "full"):
    print(f"\n| {mode} | mesh | chips | GiB on a chip | GiB received a step |", " | ".join(CHIPS), "|")
    print("|" + "---|" * (5 + len(CHIPS)))
    for name, m in MODELS.items():
      for mesh in ("data", "fsdp"):
        if all(state(m, mode, mesh, 1024) > chip.memory for chip in CHIPS.values()):
          continue
        for n in (8, 64, 256, 1024):
          size = sum(received(m, mode, mesh, n, options.rows, options.length).values())
          cells = [cell(m, mode, mesh, chip, n, options.rows, options.length) for chip in CHIPS.values()]
          print(f"| {name} | `{mesh}` | {n:,} | {state(m, mode, mesh, n) / 2**30:.1f} | {size / 2**30:.2f} |",
                " | ".join(cells), "|")  # fmt: skip


if __name__ == "__main__":
  main()

"""The published way to class statistics, written out in PyTorch for `benchmarks/collapse.py`: dense one-hot products.

  python benchmarks/collapse_peer.py IN.npz OUT.npz

IN: x [N, D], label [N], classes, batch. Two passes: counts and sums as one-hot^T x, then squared distances from the
means as a one-hot product. Prints {"seconds"}, reading and writing apart; OUT: count, mean, square.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch


def main(source: str, out: str) -> None:
  given = np.load(source)
  x_ND, label_N = torch.from_numpy(given["x"]), torch.from_numpy(given["label"]).long()
  C, size = int(given["classes"]), int(given["batch"])
  began = time.perf_counter()
  count, total, square = torch.zeros(C), torch.zeros(C, x_ND.shape[1]), torch.zeros(C)
  for at in range(0, len(x_ND), size):
    hot_NC = torch.nn.functional.one_hot(label_N[at : at + size], C).float()
    count += hot_NC.sum(0)
    total += hot_NC.T @ x_ND[at : at + size]
  mean = total / (count[:, None] + torch.finfo(torch.float32).eps)
  for at in range(0, len(x_ND), size):
    hot_NC = torch.nn.functional.one_hot(label_N[at : at + size], C).float()
    square += hot_NC.T @ ((x_ND[at : at + size] - mean[label_N[at : at + size]]) ** 2).sum(-1)
  print(json.dumps({"seconds": time.perf_counter() - began}))
  np.savez(out, count=count.numpy(), mean=mean.numpy(), square=square.numpy())


if __name__ == "__main__":
  main(*sys.argv[1:])

"""What the tests of readers share."""

from __future__ import annotations

import pytest

from jaxbias.errors import UserError


def message(call, *arguments) -> str:
  with pytest.raises(UserError) as caught:
    call(*arguments)
  assert "\n" not in str(caught.value)
  return str(caught.value)

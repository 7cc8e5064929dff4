from typing import Literal

from bmctl.schema import Strict


class Config(Strict):
    kind: Literal["csv"] = "csv"

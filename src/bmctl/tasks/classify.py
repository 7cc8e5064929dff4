from typing import Literal
from bmctl.schema import Strict, Ratio
class Config(Strict):
    kind: Literal["classify"] = "classify"
    label_smoothing: Ratio = 0.0

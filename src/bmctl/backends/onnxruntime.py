from typing import Literal
from bmctl.schema import Strict
class Config(Strict):
    name: Literal["onnxruntime"] = "onnxruntime"

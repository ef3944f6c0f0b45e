"""Define torchvision's operator schemas before torchvision is imported beside a CPU build of torch.

The torchvision wheel is built for CUDA; its compiled library can't be loaded here, so `import torchvision` fails when
it registers fake kernels for operators that nobody defined. Its pure-Python transforms, which the processors of
Qwen-VL and LLaVA-OneVision use, need none of those operators. vLLM imports torchvision before it loads plugins, so this
runs at interpreter start: a finder waits for the import and costs nothing until then.
"""

import importlib.abc
import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _define_schemas()


def _define_schemas() -> None:
    global _library
    import torch

    if torch.version.cuda is not None:
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(name + SCHEMA)


sys.meta_path.insert(0, _BeforeTorchvision())

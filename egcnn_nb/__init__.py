"""Edge-Gated CNNs for volumetric segmentation: `from egcnn_nb import EGCNN, EGLoss, fit, predict`.

The names are listed in `__init__.pyi`. Each is loaded when it is first used, and not before."""
import lazy_loader

__version__ = "0.2.0.dev0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""What transformers calls the settings of our directories, and how it is asked to pack dense ones."""

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from alphaprune import formats
from alphaprune.formats import quantize


@register_quantization_config("alphaprune")
class AlphaPruneConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed directory: {"quant_method": "alphaprune", "format": "sbt", …}.

    Given to `from_pretrained` with a dense directory, it packs the linear layers of the decoder blocks while they are
    loaded, where that is smaller.
    values: "int8" where layers are rounded; of a packed directory it informs, the tensors say for themselves what they
    hold. group: 128, or None for one scale per row. head: "int8" where the output layer is rounded, too, see head.py.
    modules_to_not_convert: names of layers to leave dense, or patterns as transformers has them. kv_heads, channels,
    ranks: of a directory whose blocks have other sizes than its config says, see shapes.py; format "dense" where no
    more than these is ours. ValueError on a setting that it does not know, or of a wrong type.
    """

    values: str | None = None
    group: int | None = None
    head: str | None = None
    modules_to_not_convert: list[str] | None = None
    kv_heads: list[int] | None = None
    channels: list[int] | None = None
    ranks: dict[str, int] | None = None

    def __init__(
        self,
        format: str = "sbt",  # noqa: A002
        format_version: int = formats.VERSION,
        values: str | None = None,
        group: int | None = None,
        head: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        kv_heads: list[int] | None = None,
        channels: list[int] | None = None,
        ranks: dict[str, int] | None = None,
        quant_method: str = "alphaprune",
        **unknown: Any,
    ) -> None:
        self.quant_method = "alphaprune"  # type: ignore[assignment]  # the enum of transformers names its own only
        self.format = format
        self.format_version = format_version
        given: dict[str, Any] = {"values": values, "group": group, "head": head}
        given |= {"modules_to_not_convert": modules_to_not_convert}
        given |= {"kv_heads": kv_heads, "channels": channels, "ranks": ranks}
        vars(self).update({name: value for name, value in given.items() if value is not None})
        if type(format_version) is not int or format_version < 1:
            raise ValueError(f"quantization_config: format_version {format_version!r}: wanted a whole number from 1")
        if format_version > formats.VERSION:
            return  # its settings are not known here; `validate_environment` says so
        if unknown:
            known = ", ".join(("format", "format_version", *given))
            raise ValueError(f"quantization_config: no setting is called {', '.join(unknown)}; there are: {known}")
        if head not in (None, *quantize.VALUES):
            raise ValueError(f"quantization_config: head {head!r}: wanted {', '.join(quantize.VALUES)}, or none")
        quantize.check(values or head, group)
        names = modules_to_not_convert
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
            raise ValueError(f"quantization_config: modules_to_not_convert {names!r}: wanted a list of layer names")

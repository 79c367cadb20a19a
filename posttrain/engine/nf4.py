"""Frozen matrices of dense models in NF4 (QLoRA, arXiv:2305.14314), by bitsandbytes; products are in bfloat16."""

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.engine import adapters
from posttrain.errors import MachineError, ModelError


def hold_nf4(model: PreTrainedModel) -> None:
    """Put the layers' frozen linear weights in four bits, in blocks of 64 with scales that are quantized themselves.

    Embedding and output head stay as they are. Raises ModelError for a model with experts, MachineError without the
    library.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise MachineError(
            "precision nf4 needs the library bitsandbytes: pip install 'posttrain[cuda]', or use bfloat16"
        ) from error
    if any(adapters.is_experts(module) for module in model.modules()):
        raise ModelError(
            "precision nf4 is for dense models: the experts of this one are no linear layers. Use bfloat16; an MXFP4 "
            "base stays in four bits with --base-weights packed"
        )
    for parent in list(model.get_decoder().layers.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear and not module.weight.requires_grad:
                setattr(parent, name, _packed(bitsandbytes.nn, module))


def _packed(library: object, module: nn.Linear) -> nn.Module:
    device = module.weight.device
    packed = library.Linear4bit(  # type: ignore[attr-defined]
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    packed.weight = library.Params4bit(  # type: ignore[attr-defined]
        module.weight.detach().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
    )
    packed.bias = module.bias
    # Moving it is what quantizes it.
    return packed.to(device)

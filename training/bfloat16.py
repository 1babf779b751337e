"""Whether a device multiplies in bfloat16 itself, so that bfloat16 saves time there."""

import torch


def multiplies_in_bfloat16(device: str | torch.device) -> bool:
    """
    Whether matrix products in bfloat16 are at least as fast as in float32 on this device.

    A CPU without instructions for it converts every number, and a product then takes 20 to 50 times as long; GPUs
    before Ampere (V100, T4) convert, too. Nothing is timed: a run must not compute in another precision because the
    machine was busy when it began.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if kind != "cpu":
        return True
    # What PyTorch was told not to use (ATEN_CPU_CAPABILITY) does not count, though the processor has it.
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))

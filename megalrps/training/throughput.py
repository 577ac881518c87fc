"""Model FLOPs utilisation: published dense peaks, and nothing where the peak is not known."""

# Dense bf16 tensor-core peak in FLOP/s, by the name the driver reports (NVIDIA data sheets; sparse figures are twice
# these and are not used). A device that is not listed has no MFU: another card's peak would be a wrong figure.
_DENSE_BF16_PEAK = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
}


def peak_flops(device_name: str | None, bf16: bool) -> float | None:
    """Dense peak in FLOP/s of the named device for bf16 work; None where it is not known or the work is fp32."""
    if device_name is None or not bf16:
        return None
    return _DENSE_BF16_PEAK.get(device_name)

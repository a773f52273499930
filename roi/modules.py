"""The operators as modules, with torchvision's names and arguments."""

# Annotations are not postponed: torch.fx writes those of forward() into its graphs, as names and not strings.

from collections.abc import Sequence

from torch import Tensor, nn

from roi._backend import backend_repr
from roi._boxes import Boxes
from roi.functions import ps_roi_align, ps_roi_pool, roi_align, roi_pool


class RoIPool(nn.Module):
    """`roi_pool` with fixed options. In place of `torchvision.ops.RoIPool`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes, or a pair of them, in height and in width.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float | Sequence[float], *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """`roi_pool(input, rois, …)`: Tensor[N, C, H, W] and boxes -> Tensor[K, C, height, width]."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale, backend=self.backend)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}{backend_repr(self.backend)}"


class RoIAlign(nn.Module):
    """`roi_align` with fixed options. In place of `torchvision.ops.RoIAlign`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes, or a pair of them, in height and in width.
        sampling_ratio: samples per side of a bin; 0 or less: one for each cell of the side, rounded up.
        aligned: whether cells have their values at their centres.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float | Sequence[float],
        sampling_ratio: int,
        aligned: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """`roi_align(input, rois, …)`: Tensor[N, C, H, W] and boxes -> Tensor[K, C, height, width]."""
        options = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        return roi_align(input, rois, *options, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}{backend_repr(self.backend)}"
        )


class PSRoIPool(nn.Module):
    """`ps_roi_pool` with fixed options. In place of `torchvision.ops.PSRoIPool`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes, or a pair of them, in height and in width.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float | Sequence[float], *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Tensor[N, C·height·width, H, W] and boxes -> Tensor[K, C, height, width]."""
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale, backend=self.backend)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}{backend_repr(self.backend)}"


class PSRoIAlign(nn.Module):
    """`ps_roi_align` with fixed options. In place of `torchvision.ops.PSRoIAlign`.

    Args:
        output_size: bins, an int or (height, width).
        spatial_scale: cells of the map per unit of the boxes, or a pair of them, in height and in width.
        sampling_ratio: samples per side of a bin; 0 or less: one for each cell of the side, rounded up.
        backend: "auto", "torch" or "cupy".
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float | Sequence[float],
        sampling_ratio: int,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.backend = backend

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Tensor[N, C·height·width, H, W] and boxes -> Tensor[K, C, height, width]."""
        options = self.output_size, self.spatial_scale, self.sampling_ratio
        return ps_roi_align(input, rois, *options, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}{backend_repr(self.backend)}"
        )

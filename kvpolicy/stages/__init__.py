"""What a plugin is: import everything that a plugin needs from here."""

from kvpolicy.stages.contracts import (
    STAGES,
    AllocationRequest,
    Allocator,
    Codec,
    Entries,
    HeadAllocator,
    JointAllocator,
    LayerAllocator,
    Merger,
    Needs,
    Observer,
    Plugin,
    Reader,
    ReadRequest,
    Scorer,
    Selector,
    State,
    ViewPlugin,
)
from kvpolicy.stages.formats import AsIs, Column, Format, Formats, Sample, Site
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.parameters import (
    Choice,
    Flag,
    Integer,
    Nested,
    Number,
    Plugged,
    Rule,
    Text,
    parameter,
)
from kvpolicy.stages.projected_values import output_norms
from kvpolicy.stages.prompt_passes import Pass, Prompt
from kvpolicy.stages.query_logits import QueryLogits
from kvpolicy.stages.registry.hooks import hookimpl
from kvpolicy.stages.rotary import Rotary
from kvpolicy.stages.selection_request import SelectionRequest
from kvpolicy.stages.slots import gather, indices_of
from kvpolicy.stages.view import View
from kvpolicy_kernels import ColumnRequest, Postprocess, Tile, Traffic, WindowUse
from kvpolicy_kernels.attention.kv_input import PackedColumn, Unpacking

__all__ = [
    "STAGES",
    "AllocationRequest",
    "Allocator",
    "AsIs",
    "Choice",
    "Codec",
    "Column",
    "ColumnRequest",
    "Entries",
    "Flag",
    "Format",
    "Formats",
    "Geometry",
    "HeadAllocator",
    "Integer",
    "JointAllocator",
    "LayerAllocator",
    "Merger",
    "Needs",
    "Nested",
    "Number",
    "Observer",
    "PackedColumn",
    "Pass",
    "Plugged",
    "Plugin",
    "Postprocess",
    "Prompt",
    "QueryLogits",
    "ReadRequest",
    "Reader",
    "Rotary",
    "Rule",
    "Sample",
    "Scorer",
    "SelectionRequest",
    "Selector",
    "Site",
    "State",
    "Text",
    "Tile",
    "Traffic",
    "Unpacking",
    "View",
    "ViewPlugin",
    "WindowUse",
    "gather",
    "hookimpl",
    "indices_of",
    "output_norms",
    "parameter",
]

"""Checks for scorers and allocators that must be calibrated; codecs have their own."""

import contextlib

import attrs
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages.checking.returned import check_tensor, contract_error
from kvpolicy.stages.checking.untouched import untouched
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import calibration_sample, expect_close
from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.formats import Site

_LAYERS = 3


def measures_every_layer_alike(plugin: Plugin, _promises: Promises) -> None:
    if not plugin.calibrated:
        return
    samples = [calibration_sample(layer) for layer in range(_LAYERS)]
    inputs = {
        f"{name} of layer {layer}": getattr(sample, name)
        for layer, sample in enumerate(samples)
        for name in ("queries", "keys", "values")
    }
    with untouched(plugin, inputs):
        measured = plugin.calibrate(samples)
    if len(measured) != _LAYERS:
        raise contract_error(plugin, f"calibrated {len(measured)} layers, expected {_LAYERS}")
    for first, again in zip(measured, plugin.calibrate(samples), strict=True):
        if first.keys() != again.keys():
            raise contract_error(plugin, f"measured {sorted(again)} the second time, expected {sorted(first)}")
        for name, tensor in first.items():
            expect_close(plugin, again[name], tensor, "when it is calibrated a second time")


def checks_its_calibration(plugin: Plugin, _promises: Promises) -> None:
    """A calibration by the plugin is accepted, and refused with NaN in it."""
    if not plugin.calibrated:
        return
    sample = calibration_sample(0)
    (measured,) = plugin.calibrate([sample])
    site = Site(sample.geometry, torch.float32, rotary=sample.rotary, calibration=measured)
    plugin.check_calibration(site)
    for name, tensor in measured.items():
        if tensor.is_floating_point() and tensor.numel():
            other = attrs.evolve(site, calibration={**measured, name: torch.full_like(tensor, torch.nan)})
            with contextlib.suppress(ParameterError):
                plugin.check_calibration(other)
                raise contract_error(plugin, f"accepts a calibration whose {name!r} is NaN")


def makes_probes_of_the_text(plugin: Plugin, _promises: Promises) -> None:
    """Of texts of any length, as many tokens, and none that the text does not have."""
    if not plugin.calibrated:
        return
    for rows, length in ((1, 2), (3, 5), (4, 64)):
        text = (torch.arange(rows * length) * 7).reshape(rows, length)
        with untouched(plugin, {"tokens": text}):
            probes = plugin.probes(text)
        check_tensor(plugin, probes, {"rows": rows, "tokens": length}, torch.int64, text.device)
        if not torch.equal(plugin.probes(text), probes):
            raise contract_error(plugin, "makes other probes of a text the second time")
        if not torch.isin(probes, text).all():
            raise contract_error(plugin, "makes probes with tokens that are not in the text")


CHECKS = (makes_probes_of_the_text, measures_every_layer_alike, checks_its_calibration)

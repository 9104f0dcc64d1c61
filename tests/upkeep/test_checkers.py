"""A checker that leaves out one of its checks is caught by the faults that the tests inject."""

import dataclasses

import numpy as np
import pytest
from fsck_samples import EVERY, told_of, with_faults

from kvstore import chunk
from kvstore.gc.forest import Forest
from kvstore.upkeep import inspection, namespace_check, verifier, walk

FOREST_OF = Forest.of


async def no_sections(backend, inspection):
    return
    yield


async def nothing(*arguments):
    return None


def no_contradictions(chunks):
    forest = FOREST_OF(chunks)
    return dataclasses.replace(forest, contrary=np.zeros_like(forest.contrary))


MUTANTS = {
    "sections are not read": (namespace_check, "section_faults", no_sections),
    "section checksums are not compared": (chunk.SectionDigest, "verify", lambda self, section: None),
    "header checksums are not compared": (chunk, "_header_checksum", lambda region: bytes(region[16:32])),
    "names and sizes are not compared": (inspection, "fault_of", lambda *_: None),
    "the namespace's form is not compared": (inspection, "_fault_of_form", lambda *_: None),
    "holes are not looked for": (namespace_check, "orphans", lambda *_: []),
    "ranks are not compared": (namespace_check, "gaps", lambda *_: []),
    "depths are not compared": (Forest, "of", no_contradictions),
    "documents are not read": (namespace_check.NamespaceCheck, "_check_document", nothing),
    "foreign objects in namespaces are passed over": (namespace_check, "check_foreign", nothing),
    "one part of a folder is not listed": (walk, "_REACHES", walk._REACHES[1:]),
    "foreign objects outside of namespaces are passed over": (verifier, "check_foreign", nothing),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_p15_a_checker_that_does_not_check_would_be_seen(monkeypatch, mutant):
    owner, name, replacement = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, replacement)
    assert any(sorted(told_of(objects)) != sorted(told) for objects, told in map(with_every_fault, range(8)))


def with_every_fault(seed):
    return with_faults(seed, EVERY)

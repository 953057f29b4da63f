"""Detectors: from the branches' features to one confidence per branch and one score. One file each."""

from hardening.detectors.base import Detector
from hardening.detectors.consistency import ConsistencyDetector
from hardening.detectors.paper import PaperDetector
from hardening.detectors.sentinel import SentinelDetector

__all__ = ["ConsistencyDetector", "Detector", "PaperDetector", "SentinelDetector"]

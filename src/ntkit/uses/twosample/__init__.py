"""Do two samples come from one distribution, do two measurements depend on each other, which examples do not belong?"""

from ntkit.uses.twosample.baselines import binomial_pvalue, classifier_test, rbf_test
from ntkit.uses.twosample.curve import PowerCurve, Subsamples, power_curve
from ntkit.uses.twosample.hsic import Biased, Debiased, independence_test
from ntkit.uses.twosample.mmd import two_sample_test
from ntkit.uses.twosample.networks import random_network
from ntkit.uses.twosample.outliers import Outliers, outlier_scores, outlier_test
from ntkit.uses.twosample.result import Power, TestResult
from ntkit.uses.twosample.statistics import Block, Linear, Unbiased
from ntkit.uses.twosample.witness_test import witness_test
from ntkit.uses.twosample.witnesses import KernelWitness, OnlineTraining, Witness, ZeroTime

__all__ = [
    "Biased",
    "Block",
    "Debiased",
    "KernelWitness",
    "Linear",
    "OnlineTraining",
    "Outliers",
    "Power",
    "PowerCurve",
    "Subsamples",
    "TestResult",
    "Unbiased",
    "Witness",
    "ZeroTime",
    "binomial_pvalue",
    "classifier_test",
    "independence_test",
    "outlier_scores",
    "outlier_test",
    "power_curve",
    "random_network",
    "rbf_test",
    "two_sample_test",
    "witness_test",
]

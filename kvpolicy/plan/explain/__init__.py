"""What a plan will do and cost, before anything runs: budgets, bytes held, bytes that a compression moves."""

from kvpolicy.plan.explain.explanation import Explanation, explain

__all__ = ["Explanation", "explain"]

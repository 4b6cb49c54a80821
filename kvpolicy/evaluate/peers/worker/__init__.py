"""Runs in the environment of the peers, without kvpolicy: measures their caches on cases that it is given.

There this package is imported under the name `worker`, so its modules import each other relatively.
"""

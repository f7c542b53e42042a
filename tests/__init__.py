"""Tests by behaviour: unit/ mirrors the tree, integration/ talks to real servers, e2e/ walks the whole way."""

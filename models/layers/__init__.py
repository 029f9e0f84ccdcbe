"""The parts of the transformer, as linen modules and the functions they call. Linen stays in this package and in
`models`.
"""

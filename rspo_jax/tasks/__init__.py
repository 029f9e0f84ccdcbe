"""Problems that are made here, their answers and checkers, and what finds the final answer in a text. Knows no
model.
"""

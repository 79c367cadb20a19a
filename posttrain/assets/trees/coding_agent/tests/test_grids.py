from grids import diagonal, filled, largest, neighbours, next_life, steps, turned


def test_turned():
    assert turned([[1, 2, 3], [4, 5, 6]]) == [[4, 1], [5, 2], [6, 3]]
    assert turned([[7]]) == [[7]]


def test_neighbours():
    grid = [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert neighbours(grid, 1, 1) == 4
    assert neighbours(grid, 0, 0) == 2
    assert neighbours(grid, 2, 2) == 1


def test_next_life():
    assert next_life([[0, 1, 0], [0, 1, 0], [0, 1, 0]]) == [
        [0, 0, 0],
        [1, 1, 1],
        [0, 0, 0],
    ]
    assert next_life([[1, 1], [1, 1]]) == [[1, 1], [1, 1]]
    assert next_life([[1, 1], [0, 0]]) == [[0, 0], [0, 0]]


def test_largest():
    assert largest([[1, 9], [9, 2]]) == (0, 1)
    assert largest([[3, 1], [2, 5]]) == (1, 1)
    assert largest([[4]]) == (0, 0)


def test_filled():
    grid = [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert filled(grid, 0, 0) == 3
    assert filled(grid, 2, 2) == 4
    assert filled(grid, 2, 0) == 1


def test_diagonal():
    assert diagonal([[1, 2, 3], [4, 5, 6], [7, 8, 9]]) == 25
    assert diagonal([[1, 2], [3, 4]]) == 10


def test_steps():
    assert steps([[0, 1, 0], [0, 1, 0], [0, 0, 0]], (0, 2)) == 6
    assert steps([[0, 1], [1, 0]], (1, 1)) == -1
    assert steps([[0]], (0, 0)) == 0

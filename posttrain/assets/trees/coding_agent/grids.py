Grid = list[list[int]]


def turned(grid: Grid) -> Grid:
    return [[row[place] for row in reversed(grid)] for place in range(len(grid[0]))]


def neighbours(grid: Grid, row: int, column: int) -> int:
    total = 0
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            if down == 0 and right == 0:
                continue
            if 0 <= row + down < len(grid) and 0 <= column + right < len(grid[0]):
                total += grid[row + down][column + right]
    return total


def next_life(grid: Grid) -> Grid:
    found = []
    for row in range(len(grid)):
        line = []
        for column in range(len(grid[0])):
            near = neighbours(grid, row, column)
            if near == 3 or (near == 2 and grid[row][column] == 1):
                line.append(1)
            else:
                line.append(0)
        found.append(line)
    return found


def largest(grid: Grid) -> tuple[int, int]:
    best = (0, 0)
    for row in range(len(grid)):
        for column in range(len(grid[row])):
            if grid[row][column] > grid[best[0]][best[1]]:
                best = (row, column)
    return best


def filled(grid: Grid, row: int, column: int) -> int:
    wanted, seen, todo = grid[row][column], set(), [(row, column)]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        if not (0 <= at[0] < len(grid) and 0 <= at[1] < len(grid[0])):
            continue
        if grid[at[0]][at[1]] != wanted:
            continue
        seen.add(at)
        todo += [
            (at[0] + 1, at[1]),
            (at[0] - 1, at[1]),
            (at[0], at[1] + 1),
            (at[0], at[1] - 1),
        ]
    return len(seen)


def diagonal(grid: Grid) -> int:
    total = 0
    for place in range(len(grid)):
        total += grid[place][place]
        if place != len(grid) - 1 - place:
            total += grid[place][len(grid) - 1 - place]
    return total


def steps(walls: Grid, goal: tuple[int, int]) -> int:
    seen, ring, count = {(0, 0)}, [(0, 0)], 0
    while ring:
        if goal in ring:
            return count
        wider = []
        for row, column in ring:
            for at in (
                (row + 1, column),
                (row - 1, column),
                (row, column + 1),
                (row, column - 1),
            ):
                inside = 0 <= at[0] < len(walls) and 0 <= at[1] < len(walls[0])
                if inside and at not in seen and walls[at[0]][at[1]] == 0:
                    seen.add(at)
                    wider.append(at)
        ring, count = wider, count + 1
    return -1

"""Which piece of which block goes where: planned on every rank alone, and yet they agree.

Both ends list the pieces of a pair of ranks in one order, by parameter and then by block, so a
buffer needs no header.
"""

from __future__ import annotations

import itertools
import math

from shampoo_func.blocks import ParameterPlan
from shampoo_func.errors import ShardingError
from shampoo_func.sharding.cells import Cell, Span, Window, cells_of, common, window_of, windows
from shampoo_func.sharding.exchange import Request
from shampoo_func.sharding.storage import Region, local_shape
from shampoo_func.sharding.trade import Cut, Grid, Join, Part, Sources, Trade

__all__ = ["plan_trade"]


def plan_trade(request: Request, leaves: list[int]) -> Trade:
    """Plan both ways for some of the parameters.

    Args:
        request: What everybody knows.
        leaves: The parameters, those of one dtype that have gradients.

    Raises:
        ShardingError: If the ranks do not store all of a parameter between them.
    """
    plan, rank = request.plan, request.rank
    owners = dict(zip(plan.stacks, plan.owners, strict=True))
    world = range(plan.world)
    cuts: list[list[Cut]] = [[] for _ in world]  # to every owner
    homes: list[list[tuple[int, tuple[int, ...], int]]] = [[] for _ in world]  # from every owner
    owned: list[tuple[int, Cell]] = []
    shared = {id(storage): Sources(storage) for storage in request.storages}
    sources = {leaf: shared[id(request.storages[leaf])] for leaf in leaves}
    for leaf in leaves:
        parameter, storage = plan.blocks.parameters[leaf], request.storages[leaf]
        cells = cells_of(parameter)
        owned += [(leaf, cell) for cell in cells.values() if owners[cell.stack][cell.row] == rank]
        region = storage.regions[rank]
        if region is None or not parameter.tiles:
            continue
        merged = local_shape(region)
        ranks = sources[leaf].holders[region, storage.parts[rank]]
        for place, spans in windows(parameter, region):
            owner = owners[cells[place].stack][cells[place].row]
            window = window_of(spans)
            if sources[leaf].nearest(ranks, owner) == rank:
                cuts[owner].append(Cut(leaf, merged, window))
            homes[owner].append((leaf, place, math.prod(size for _, size in window)))
    rows: dict[str, int] = {}
    pieces, joins = _plan_joins(request, owned, sources)
    places = {}
    for leaf, cell in sorted(owned, key=lambda own: (own[1].stack, own[1].row)):
        places[leaf, cell.place] = rows.get(cell.stack, 0)
        rows[cell.stack] = places[leaf, cell.place] + 1
    parts, returned = _plan_parts(request, owned, places)
    flat = [home for owner in homes for home in owner]
    layouts = _plan_layouts(request, leaves, flat)
    return Trade(
        tuple(cut for owner in cuts for cut in owner),
        tuple(sum(_area(cut.window) for cut in owner) for owner in cuts),
        tuple(size for sender in pieces for size in sender),
        tuple(sum(sender) for sender in pieces),
        joins,
        parts,
        returned,
        tuple(size for _, _, size in flat),
        tuple(sum(size for _, _, size in owner) for owner in homes),
        layouts,
    )


def _plan_joins(
    request: Request, owned: list[tuple[int, Cell]], sources: dict[int, Sources]
) -> tuple[list[list[int]], tuple[Join, ...]]:
    """Plan what comes in: the sizes of the pieces from every rank, and the owned blocks."""
    sizes: list[list[int]] = [[] for _ in range(request.plan.world)]
    drafts: list[tuple[int, Cell, list[dict[tuple[Span, ...], tuple[int, int]]]]] = []
    for leaf, cell in owned:
        storage = request.storages[leaf]
        parameter = request.plan.blocks.parameters[leaf]
        found: list[dict[tuple[Span, ...], tuple[int, int]]] = [{} for _ in range(storage.summands)]
        for (region, part), ranks in sources[leaf].holders.items():
            spans = common(parameter, region, cell.place)
            if spans is None:
                continue
            sender = sources[leaf].nearest(ranks, request.rank)
            found[part][spans] = (sender, len(sizes[sender]))
            sizes[sender].append(math.prod(span.size for span in spans))
        drafts.append((leaf, cell, found))
    first = list(itertools.accumulate((len(sender) for sender in sizes), initial=0))
    joins = []
    for leaf, cell, found in drafts:
        grids = tuple(
            _grid_of_block(
                cell, {k: first[s] + i for k, (s, i) in held.items()}, request.plan.paths[leaf]
            )
            for held in found
        )
        joins.append(Join(leaf, cell.stack, grids, request.storages[leaf].average))
    return sizes, tuple(joins)


def _grid_of_block(cell: Cell, held: dict[tuple[Span, ...], int], name: str) -> Grid:
    """Lay out the pieces of a block.

    Raises:
        ShardingError: If they do not tile it.
    """
    by_indices = {tuple(span.inside for span in spans): piece for spans, piece in held.items()}
    lines = [sorted({key[dim] for key in by_indices}) for dim in range(len(cell.shape))]
    places = list(itertools.product(*lines))
    covered = [sum(stop - start for line in dim for start, stop in line) for dim in lines]
    if covered != list(cell.shape) or any(place not in by_indices for place in places):
        raise ShardingError(
            f"the block at {cell.place} of parameter {name!r} is not stored, each element once, by "
            "the ranks of the mesh; give blocked a mesh with all ranks that hold a part of it."
        )
    order = []
    for dim in lines:
        indices = [i for line in dim for start, stop in line for i in range(start, stop)]
        back = sorted(range(len(indices)), key=indices.__getitem__)
        order.append(None if back == list(range(len(back))) else tuple(back))
    shapes = tuple(
        tuple(sum(stop - start for start, stop in line) for line in place) for place in places
    )
    return Grid(
        tuple(by_indices[place] for place in places),
        shapes,
        tuple(len(dim) for dim in lines),
        tuple(order),
    )


def _plan_parts(
    request: Request,
    owned: list[tuple[int, Cell]],
    places: dict[tuple[int, tuple[int, ...]], int],
) -> tuple[tuple[Part, ...], tuple[int, ...]]:
    """Plan what goes back to every rank that stores a part of an owned block."""
    parts: list[Part] = []
    returned = []
    parameters = request.plan.blocks.parameters
    for rank in range(request.plan.world):
        total = 0
        for leaf, cell in owned:
            region = request.storages[leaf].regions[rank]
            spans = None if region is None else common(parameters[leaf], region, cell.place)
            if spans is None:
                continue
            window = tuple((span.inside[0][0], span.inside[-1][1]) for span in spans)
            window = tuple((start, stop - start) for start, stop in window)
            listed = tuple(_listed(span) for span in spans)
            parts.append(Part(leaf, cell.stack, places[leaf, cell.place], window, listed))
            total += math.prod(span.size for span in spans)
        returned.append(total)
    return tuple(parts), tuple(returned)


def _listed(span: Span) -> tuple[int, ...] | None:
    """Return the indices of a span within its window, or None if they are all of it."""
    if len(span.inside) == 1:
        return None
    first = span.inside[0][0]
    return tuple(i - first for start, stop in span.inside for i in range(start, stop))


def _plan_layouts(
    request: Request, leaves: list[int], pieces: list[tuple[int, tuple[int, ...], int]]
) -> tuple[tuple[int, Grid], ...]:
    """Lay out the pieces that come back as the local tensors."""
    arrived: dict[int, dict[tuple[int, ...], int]] = {leaf: {} for leaf in leaves}
    for piece, (leaf, place, _) in enumerate(pieces):
        arrived[leaf][place] = piece
    layouts = []
    for leaf in leaves:
        own = arrived[leaf]
        region = request.storages[leaf].regions[request.rank]
        if not own or region is None:
            continue
        layouts.append((leaf, _grid_of_leaf(request.plan.blocks.parameters[leaf], region, own)))
    return tuple(layouts)


def _grid_of_leaf(
    parameter: ParameterPlan, region: Region, pieces: dict[tuple[int, ...], int]
) -> Grid:
    shapes = {
        place: tuple(span.size for span in spans) for place, spans in windows(parameter, region)
    }
    places = list(shapes)
    widths = tuple(len({place[dim] for place in places}) for dim in range(len(parameter.merged)))
    return Grid(
        tuple(pieces[place] for place in places),
        tuple(shapes[place] for place in places),
        widths,
        (None,) * len(widths),
    )


def _area(window: Window) -> int:
    return math.prod(size for _, size in window)

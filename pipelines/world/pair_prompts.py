"""Fixed prompts with two objects, and prompts with both kinds mixed.

Notable choices
- `PAIR_PROMPTS` are 64 prompts in four blocks of 16, each balanced over every attribute of both objects, without
  held-out triples; `HELD_OUT_PAIR_PROMPTS` are 36 prompts: in each one object is a held-out triple (every triple twice,
  the first object in even rows, the second in odd ones) and the other one a seen triple.
- Written as tables and expanded, one prompt a row: first object, second object, background and style.
"""

from __future__ import annotations

from foveal.pipelines.world.vocabulary import Scene, Thing, describe


def _prompts(table: str) -> tuple[str, ...]:
    return tuple(describe(_scene(row)) for row in table.strip().splitlines())


def _scene(row: str) -> Scene:
    first, second, (background, style) = (part.split() for part in row.split(", "))
    return Scene.of(Thing(*first), style, background, Thing(*second))


PAIR_PROMPTS: tuple[str, ...] = _prompts("""
small green circle down-right, large cyan square up, forest checker
small green ring left, small purple triangle down-right, black plain
large red square up-right, small white cross left, gray striped
small cyan triangle left, small purple circle still, navy plain
small blue square down-right, large white ring still, black striped
large yellow circle down, small orange triangle left, navy checker
small blue cross up-right, large green circle down-left, navy striped
large yellow ring down-left, small orange ring up, black plain
small red circle still, small cyan ring down-right, navy plain
large white cross down-left, small yellow circle up-left, gray plain
small orange triangle up-left, large blue triangle right, forest checker
large orange square right, small red cross up-left, forest checker
large purple square up-left, large yellow triangle down, gray plain
large cyan ring down, large blue square up-right, gray striped
large white cross up, large green cross down-left, black striped
small purple triangle up, large red square up-right, forest checker
large red square down-right, small purple triangle left, navy checker
small white circle down, large orange ring still, black striped
small blue circle still, large orange triangle down-left, navy plain
small yellow ring still, large white ring down-left, gray plain
large purple cross down-left, large green cross down, gray checker
large green ring down-left, small white circle up-right, gray striped
large cyan cross left, small blue ring up, black plain
small white circle left, large blue cross up, navy striped
large blue triangle up-left, large yellow circle up-left, forest striped
large green triangle right, small red triangle right, gray checker
small cyan circle down-right, small red square up-right, black plain
small yellow square up-left, large cyan square right, navy checker
small purple ring up-right, small cyan circle still, forest striped
large orange triangle up-right, small purple circle down, black plain
large red cross up, large yellow square down-right, forest plain
small orange square up, small green cross up-left, forest checker
small yellow triangle left, small blue cross down, black plain
small red cross left, large cyan triangle still, black striped
large purple circle up, small white circle up-right, forest striped
small yellow cross up, small red triangle up-right, black plain
large blue cross still, large green cross up-left, forest striped
small orange ring down-left, small purple square still, black striped
small green square up-left, large orange circle left, gray plain
small cyan triangle up-right, large yellow ring down-left, navy checker
large purple circle down-left, large blue ring down-right, gray checker
large green circle still, large white square up, forest checker
small cyan ring right, small green square up-left, navy plain
large white triangle down, small purple cross left, navy checker
large blue ring up-left, large red square right, navy checker
small white square down-right, small cyan circle down, gray plain
large red cross right, small orange ring down-left, gray striped
large orange square up-right, large yellow triangle up, forest plain
small orange cross down-right, small red square down-right, gray striped
large white circle down-left, large orange ring still, navy checker
small red ring down, small green circle down-right, gray striped
small blue circle up-right, small green circle down-left, navy plain
large purple triangle down, large red square left, forest striped
large yellow square down-left, small purple cross up, gray checker
large yellow square up, large cyan square right, black striped
small green cross still, large white circle down, black plain
large red cross up-left, large blue triangle up, gray checker
large green triangle up, large white ring up-right, navy plain
small cyan square left, small orange cross down-left, black plain
small cyan ring up-left, large yellow cross left, forest checker
large orange ring right, small blue triangle up-right, forest checker
small purple circle still, small cyan triangle up-left, black striped
small blue triangle up-right, small purple ring right, navy plain
large white cross right, large yellow ring still, forest plain
""")

HELD_OUT_PAIR_PROMPTS: tuple[str, ...] = _prompts("""
small red ring still, large cyan triangle left, black plain
small orange square up-right, large red cross down, gray checker
small green square left, large blue square down, navy striped
small orange circle up, large green triangle down-left, forest plain
small green cross up, small yellow ring right, gray checker
large yellow ring up, large green cross down-right, navy striped
small blue circle up, large red square still, forest plain
large red ring up-right, large blue square up-left, black checker
small purple circle up-right, small red square up-left, navy striped
small red circle down, large purple square down-right, forest plain
small cyan triangle down-left, small red cross right, black checker
large yellow ring right, large cyan cross up, gray striped
small cyan cross up-right, large yellow circle left, forest plain
small red circle up, large orange circle down-right, black checker
small orange triangle still, small purple cross still, gray striped
small cyan cross right, large orange ring down, navy plain
small white triangle left, large yellow ring down, black checker
small orange cross down-right, large white ring left, gray striped
large red ring still, small orange circle down, navy checker
small white triangle down-right, small red cross down, forest striped
large green square left, small purple triangle right, black plain
small red ring down-left, small green triangle down-left, gray checker
large green cross up, large white triangle down, forest striped
small orange square right, small green cross down-right, black plain
large blue circle up, large cyan cross down-right, gray checker
small purple square up, small blue square up-left, navy striped
large purple circle up-right, small red square up, black plain
small green cross left, small purple square down-right, gray checker
large cyan triangle down-left, small red circle up-right, navy striped
large purple square up-right, small cyan cross up, forest plain
large cyan cross up-right, large blue circle down-left, gray checker
large green circle up-left, small orange circle down-right, navy striped
large orange triangle still, large blue cross up-left, forest plain
small purple cross up-right, small orange ring down, black checker
large white triangle left, large green circle up, navy striped
small blue circle left, small white ring left, forest plain
""")

"""Collectives in the text of programs written by hand; those of real ones are counted in train/test_four_devices.py."""

from jaxgen.collectives import Traffic, collectives

LOOP = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %gathered = bf16[16,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
}

%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]{0}) parameter(0)
  %g = f32[64]{0} get-tuple-element(%s), index=1
  %reduced = f32[64]{0} all-reduce(%g), channel_id=2, to_apply=%add
  %wide = bf16[16,8]{1,0} fusion(%g), kind=kCustom, calls=%fused
  ROOT %next = (s32[], f32[64]{0}) tuple(%g, %reduced)
}

%test (s: (s32[], f32[64])) -> pred[] {
  %s = (s32[], f32[64]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main.9_spmd (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %both = (f32[64]{0}, f32[2]{0}) all-reduce(%a, %a), channel_id=3, to_apply=%add
  %start = (f32[16]{0}, f32[64]{0}) all-gather-start(%a), channel_id=4, dimensions={0}
  %done = f32[64]{0} all-gather-done(%start)
  %loop = (s32[], f32[64]{0}) while(%a), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"30"}}
  %unknown = (s32[], f32[64]{0}) while(%a), condition=%test, body=%body
  ROOT %out = f32[64]{0} get-tuple-element(%loop), index=1
}
"""


def test_loops_count_as_often_as_they_run():
    found = collectives(LOOP)
    assert found == {
        "all-reduce": Traffic(1 + 30 + 1, (64 + 2) * 4 + 31 * 64 * 4),
        "all-gather": Traffic(1 + 31, 64 * 4 + 31 * 16 * 8 * 2),
    }


def test_branches_all_count():
    text = LOOP.replace("while(%a), condition=%test, body=%body\n", "conditional(%a), branch_computations={%body, %fused}\n")
    assert collectives(text)["all-gather"].count == 1 + 30 + 1 + 1
    assert collectives(text)["all-reduce"].count == 1 + 30 + 1


def test_none():
    assert collectives("HloModule m\n\nENTRY %main (a: f32[2]) -> f32[2] {\n  ROOT %a = f32[2]{0} parameter(0)\n}\n") == {}

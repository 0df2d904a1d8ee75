;; Between f32 and bf16, which is the upper half of an f32.
(module
  (import "env" "memory" (memory 1 65536 shared))

  ;; Widens $count dense bf16 values to f32.
  (func $widen (param $from i32) (param $to i32) (param $count i32)
    (block $done
      (loop $fours
        (br_if $done (i32.lt_s (local.get $count) (i32.const 4)))
        (v128.store (local.get $to) (i32x4.shl (v128.load16x4_u (local.get $from)) (i32.const 16)))
        (local.set $from (i32.add (local.get $from) (i32.const 8)))
        (local.set $to (i32.add (local.get $to) (i32.const 16)))
        (local.set $count (i32.sub (local.get $count) (i32.const 4)))
        (br $fours)))
    (block $done
      (loop $each
        (br_if $done (i32.eqz (local.get $count)))
        (i32.store (local.get $to) (i32.shl (i32.load16_u (local.get $from)) (i32.const 16)))
        (local.set $from (i32.add (local.get $from) (i32.const 2)))
        (local.set $to (i32.add (local.get $to) (i32.const 4)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $each))))

  ;; Widens $perJob rows (fewer at the end of $rows) of $cols bf16 values, $fromRow bytes apart, to dense rows of f32.
  (func (export "widen") (param $job i32) (param $from i32) (param $to i32) (param $rows i32) (param $cols i32)
    (param $fromRow i32) (param $perJob i32)
    (local $start i32)
    (local.set $start (i32.mul (local.get $job) (local.get $perJob)))
    (local.set $rows (i32.sub (local.get $rows) (local.get $start)))
    (if (i32.gt_s (local.get $rows) (local.get $perJob)) (then (local.set $rows (local.get $perJob))))
    (local.set $from (i32.add (local.get $from) (i32.mul (local.get $start) (local.get $fromRow))))
    (local.set $to (i32.add (local.get $to) (i32.shl (i32.mul (local.get $start) (local.get $cols)) (i32.const 2))))
    (loop $row
      (call $widen (local.get $from) (local.get $to) (local.get $cols))
      (local.set $from (i32.add (local.get $from) (local.get $fromRow)))
      (local.set $to (i32.add (local.get $to) (i32.shl (local.get $cols) (i32.const 2))))
      (br_if $row (local.tee $rows (i32.sub (local.get $rows) (i32.const 1))))))

  ;; Four f32 as the upper halves of their lanes, rounded to nearest, ties to even; a NaN stays one.
  (func $upper (param $x v128) (result v128)
    (v128.bitselect
      (i32x4.add (local.get $x)
        (i32x4.add (i32x4.splat (i32.const 0x7fff))
          (v128.and (i32x4.shr_u (local.get $x) (i32.const 16)) (i32x4.splat (i32.const 1)))))
      (v128.or (local.get $x) (i32x4.splat (i32.const 0x400000)))
      (f32x4.eq (local.get $x) (local.get $x))))

  ;; Stores rows $job * $perJob ... of the dense f32 [$rows, $cols] at $from with steps of $toRow and $toCol bytes,
  ;; as bf16 or unchanged.
  (func (export "store") (param $job i32) (param $from i32) (param $to i32) (param $rows i32) (param $cols i32)
    (param $toRow i32) (param $toCol i32) (param $bf16 i32) (param $perJob i32)
    (local $at i32) (local $left i32) (local $x v128)
    (local.set $rows (i32.sub (local.get $rows) (i32.mul (local.get $job) (local.get $perJob))))
    (if (i32.gt_s (local.get $rows) (local.get $perJob)) (then (local.set $rows (local.get $perJob))))
    (local.set $job (i32.mul (local.get $job) (local.get $perJob)))
    (local.set $from (i32.add (local.get $from) (i32.shl (i32.mul (local.get $job) (local.get $cols)) (i32.const 2))))
    (local.set $to (i32.add (local.get $to) (i32.mul (local.get $job) (local.get $toRow))))
    (loop $row
      (local.set $at (local.get $to))
      (local.set $left (local.get $cols))
      (if (i32.and (local.get $bf16) (i32.eq (local.get $toCol) (i32.const 2)))
        (then
          (block $done
            (loop $fours
              (br_if $done (i32.lt_s (local.get $left) (i32.const 4)))
              (local.set $x (call $upper (v128.load (local.get $from))))
              (local.set $x (i8x16.shuffle 2 3 6 7 10 11 14 15 2 3 6 7 10 11 14 15 (local.get $x) (local.get $x)))
              (v128.store64_lane 0 (local.get $at) (local.get $x))
              (local.set $at (i32.add (local.get $at) (i32.const 8)))
              (local.set $from (i32.add (local.get $from) (i32.const 16)))
              (local.set $left (i32.sub (local.get $left) (i32.const 4)))
              (br $fours)))))
      (block $done
        (loop $each
          (br_if $done (i32.eqz (local.get $left)))
          (if (local.get $bf16)
            (then
              (v128.store16_lane 1 (local.get $at) (call $upper (v128.load32_zero (local.get $from)))))
            (else (f32.store (local.get $at) (f32.load (local.get $from)))))
          (local.set $at (i32.add (local.get $at) (local.get $toCol)))
          (local.set $from (i32.add (local.get $from) (i32.const 4)))
          (local.set $left (i32.sub (local.get $left) (i32.const 1)))
          (br $each)))
      (local.set $to (i32.add (local.get $to) (local.get $toRow)))
      (br_if $row (local.tee $rows (i32.sub (local.get $rows) (i32.const 1))))))
)

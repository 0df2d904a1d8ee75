;; Group norm of a planar picture [batch, channels, pixels]: one job per group. A group is
;; read three times (mean, variance, result), sums are kept in f64.
(module
  (import "env" "memory" (memory 1 65536 shared))
  ;; include math.wat

  ;; Sum of $x - $mean, or of its square, over $count elements from $at on.
  (func $sum (param $at i32) (param $count i32) (param $size i32) (param $mean f32) (param $square i32) (result f64)
    (local $total v128) (local $m v128) (local $x v128) (local $step i32) (local $tail f64) (local $one f32)
    (local.set $m (f32x4.splat (local.get $mean)))
    (local.set $step (i32.shl (local.get $size) (i32.const 2)))
    (block $done
      (loop $fours
        (br_if $done (i32.lt_s (local.get $count) (i32.const 4)))
        (local.set $x (f32x4.sub (call $load4 (local.get $at) (local.get $size)) (local.get $m)))
        (if (local.get $square) (then (local.set $x (f32x4.mul (local.get $x) (local.get $x)))))
        (local.set $total (call $accumulate (local.get $total) (local.get $x)))
        (local.set $at (i32.add (local.get $at) (local.get $step)))
        (local.set $count (i32.sub (local.get $count) (i32.const 4)))
        (br $fours)))
    (block $done
      (loop $ones
        (br_if $done (i32.eqz (local.get $count)))
        (local.set $one
          (f32.sub (f32x4.extract_lane 0 (call $load1 (local.get $at) (local.get $size))) (local.get $mean)))
        (if (local.get $square) (then (local.set $one (f32.mul (local.get $one) (local.get $one)))))
        (local.set $tail (f64.add (local.get $tail) (f64.promote_f32 (local.get $one))))
        (local.set $at (i32.add (local.get $at) (local.get $size)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $ones)))
    (f64.add (local.get $tail) (call $sum2 (local.get $total))))

  (func $affine (param $x v128) (param $scale v128) (param $shift v128) (result v128)
    local.get $x local.get $scale local.get $shift f32x4.relaxed_madd)

  ;; Group $job of all groups of the batch: $perGroup channels of $pixels elements. $weight and $bias are f32
  ;; [$channels]; $size is 4 (f32) or 2 (bf16), of input and output.
  (func (export "normalize") (param $job i32) (param $from i32) (param $to i32) (param $weight i32) (param $bias i32)
    (param $channels i32) (param $perGroup i32) (param $pixels i32) (param $eps f32) (param $size i32)
    (local $count i32) (local $channel i32) (local $left i32) (local $step i32)
    (local $mean f64) (local $factor f64) (local $scale v128) (local $shift v128)
    (local.set $count (i32.mul (local.get $perGroup) (local.get $pixels)))
    (local.set $step (i32.shl (local.get $size) (i32.const 2)))
    (local.set $channel (i32.rem_u (i32.mul (local.get $job) (local.get $perGroup)) (local.get $channels)))
    (local.set $left (i32.mul (i32.mul (local.get $job) (local.get $count)) (local.get $size)))
    (local.set $from (i32.add (local.get $from) (local.get $left)))
    (local.set $to (i32.add (local.get $to) (local.get $left)))
    (local.set $mean
      (f64.div (call $sum (local.get $from) (local.get $count) (local.get $size) (f32.const 0) (i32.const 0))
        (f64.convert_i32_s (local.get $count))))
    (local.set $factor
      (f64.div (f64.const 1)
        (f64.sqrt
          (f64.add
            (f64.div
              (call $sum (local.get $from) (local.get $count) (local.get $size)
                (f32.demote_f64 (local.get $mean)) (i32.const 1))
              (f64.convert_i32_s (local.get $count)))
            (f64.promote_f32 (local.get $eps))))))
    (loop $each
      (local.set $scale
        (f32x4.splat
          (f32.demote_f64
            (f64.mul (local.get $factor)
              (f64.promote_f32 (f32.load (i32.add (local.get $weight) (i32.shl (local.get $channel) (i32.const 2)))))))))
      (local.set $shift
        (f32x4.splat
          (f32.demote_f64
            (f64.sub
              (f64.promote_f32 (f32.load (i32.add (local.get $bias) (i32.shl (local.get $channel) (i32.const 2)))))
              (f64.mul (local.get $mean) (f64.promote_f32 (f32x4.extract_lane 0 (local.get $scale))))))))
      (local.set $left (local.get $pixels))
      (block $done
        (loop $fours
          (br_if $done (i32.lt_s (local.get $left) (i32.const 4)))
          (call $store4 (local.get $to) (local.get $size)
            (call $affine (call $load4 (local.get $from) (local.get $size)) (local.get $scale) (local.get $shift)))
          (local.set $from (i32.add (local.get $from) (local.get $step)))
          (local.set $to (i32.add (local.get $to) (local.get $step)))
          (local.set $left (i32.sub (local.get $left) (i32.const 4)))
          (br $fours)))
      (block $done
        (loop $ones
          (br_if $done (i32.eqz (local.get $left)))
          (call $store1 (local.get $to) (local.get $size)
            (call $affine (call $load1 (local.get $from) (local.get $size)) (local.get $scale) (local.get $shift)))
          (local.set $from (i32.add (local.get $from) (local.get $size)))
          (local.set $to (i32.add (local.get $to) (local.get $size)))
          (local.set $left (i32.sub (local.get $left) (i32.const 1)))
          (br $ones)))
      (local.set $channel (i32.add (local.get $channel) (i32.const 1)))
      (br_if $each (local.tee $perGroup (i32.sub (local.get $perGroup) (i32.const 1))))))
)

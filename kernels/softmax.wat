;; Softmax of rows of f32 logits, after an optional bias; rows are read three times, from the cache.
(module
  (import "env" "memory" (memory 1 65536 shared))
  ;; include math.wat

  ;; Rows $job * $perJob ... of [$rows, $keys] at $logits (overwritten) to $to, as f32 ($size 4; may be $logits itself) or
  ;; bf16 ($size 2). $bias has the same shape, or is 0. With $causal >= 0 row i sees keys up to $causal + i.
  (func (export "softmax") (param $job i32) (param $logits i32) (param $to i32) (param $rows i32) (param $keys i32)
    (param $perJob i32) (param $bias i32) (param $causal i32) (param $size i32)
    (local $row i32) (local $seen i32) (local $i i32) (local $at i32) (local $add i32) (local $put i32)
    (local $x v128) (local $largest v128) (local $sum v128) (local $top f32) (local $factor v128)
    (local.set $row (i32.mul (local.get $job) (local.get $perJob)))
    (local.set $rows (i32.sub (local.get $rows) (local.get $row)))
    (if (i32.gt_s (local.get $rows) (local.get $perJob)) (then (local.set $rows (local.get $perJob))))
    (block $end
      (loop $each
        (br_if $end (i32.eqz (local.get $rows)))
        (local.set $seen (local.get $keys))
        (if (i32.ge_s (local.get $causal) (i32.const 0))
          (then (local.set $seen (i32.add (i32.add (local.get $causal) (local.get $row)) (i32.const 1)))))
        (local.set $at (i32.add (local.get $logits) (i32.shl (i32.mul (local.get $row) (local.get $keys)) (i32.const 2))))
        (local.set $add (i32.add (local.get $bias) (i32.shl (i32.mul (local.get $row) (local.get $keys)) (i32.const 2))))
        (local.set $put (i32.add (local.get $to) (i32.mul (i32.mul (local.get $row) (local.get $keys)) (local.get $size))))

        ;; The largest logit.
        (local.set $largest (v128.const f32x4 -inf -inf -inf -inf))
        (local.set $i (i32.const 0))
        (block $done
          (loop $fours
            (br_if $done (i32.gt_s (i32.add (local.get $i) (i32.const 4)) (local.get $seen)))
            (local.set $x (v128.load (local.get $at)))
            (if (local.get $bias)
              (then
                (local.set $x (f32x4.add (local.get $x) (v128.load (local.get $add))))
                (v128.store (local.get $at) (local.get $x))))
            (local.set $largest (f32x4.max (local.get $largest) (local.get $x)))
            (local.set $at (i32.add (local.get $at) (i32.const 16)))
            (local.set $add (i32.add (local.get $add) (i32.const 16)))
            (local.set $i (i32.add (local.get $i) (i32.const 4)))
            (br $fours)))
        (local.set $top
          (f32.max
            (f32.max (f32x4.extract_lane 0 (local.get $largest)) (f32x4.extract_lane 1 (local.get $largest)))
            (f32.max (f32x4.extract_lane 2 (local.get $largest)) (f32x4.extract_lane 3 (local.get $largest)))))
        (block $done
          (loop $ones
            (br_if $done (i32.ge_s (local.get $i) (local.get $seen)))
            (if (local.get $bias)
              (then
                (f32.store (local.get $at) (f32.add (f32.load (local.get $at)) (f32.load (local.get $add))))))
            (local.set $top (f32.max (local.get $top) (f32.load (local.get $at))))
            (local.set $at (i32.add (local.get $at) (i32.const 4)))
            (local.set $add (i32.add (local.get $add) (i32.const 4)))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br $ones)))

        ;; Exponentials and their sum.
        (local.set $largest (f32x4.splat (local.get $top)))
        (local.set $sum (v128.const f64x2 0 0))
        (local.set $at (i32.sub (local.get $at) (i32.shl (local.get $seen) (i32.const 2))))
        (local.set $i (i32.const 0))
        (block $done
          (loop $fours
            (br_if $done (i32.gt_s (i32.add (local.get $i) (i32.const 4)) (local.get $seen)))
            (local.set $x (call $exp (f32x4.sub (v128.load (local.get $at)) (local.get $largest))))
            (v128.store (local.get $at) (local.get $x))
            (local.set $sum (call $accumulate (local.get $sum) (local.get $x)))
            (local.set $at (i32.add (local.get $at) (i32.const 16)))
            (local.set $i (i32.add (local.get $i) (i32.const 4)))
            (br $fours)))
        (block $done
          (loop $ones
            (br_if $done (i32.ge_s (local.get $i) (local.get $seen)))
            (local.set $x (call $exp (f32x4.sub (v128.load32_splat (local.get $at)) (local.get $largest))))
            (f32.store (local.get $at) (f32x4.extract_lane 0 (local.get $x)))
            (local.set $sum (f64x2.replace_lane 0 (local.get $sum)
              (f64.add (f64x2.extract_lane 0 (local.get $sum)) (f64.promote_f32 (f32x4.extract_lane 0 (local.get $x))))))
            (local.set $at (i32.add (local.get $at) (i32.const 4)))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br $ones)))

        ;; Their shares of it; keys that the row does not see get 0.
        (local.set $factor (f32x4.splat (f32.demote_f64 (f64.div (f64.const 1) (call $sum2 (local.get $sum))))))
        (local.set $at (i32.sub (local.get $at) (i32.shl (local.get $seen) (i32.const 2))))
        (local.set $i (i32.const 0))
        (block $done
          (loop $fours
            (br_if $done (i32.gt_s (i32.add (local.get $i) (i32.const 4)) (local.get $seen)))
            (call $store4 (local.get $put) (local.get $size) (f32x4.mul (v128.load (local.get $at)) (local.get $factor)))
            (local.set $at (i32.add (local.get $at) (i32.const 16)))
            (local.set $put (i32.add (local.get $put) (i32.shl (local.get $size) (i32.const 2))))
            (local.set $i (i32.add (local.get $i) (i32.const 4)))
            (br $fours)))
        (block $done
          (loop $ones
            (br_if $done (i32.ge_s (local.get $i) (local.get $keys)))
            (call $store1 (local.get $put) (local.get $size)
              (if (result v128) (i32.lt_s (local.get $i) (local.get $seen))
                (then (f32x4.mul (v128.load32_zero (local.get $at)) (local.get $factor)))
                (else (v128.const f32x4 0 0 0 0))))
            (local.set $at (i32.add (local.get $at) (i32.const 4)))
            (local.set $put (i32.add (local.get $put) (local.get $size)))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br $ones)))
        (local.set $row (i32.add (local.get $row) (i32.const 1)))
        (local.set $rows (i32.sub (local.get $rows) (i32.const 1)))
        (br $each))))
)

;; x * sigmoid(c1 x + c3 x^3), element by element: SiLU (1, 0), quick GELU (1.702, 0) and GELU's tanh form, since
;; (1 + tanh u) / 2 = sigmoid(2u). Reads and writes each element once.
(module
  (import "env" "memory" (memory 1 65536 shared))
  ;; include math.wat

  (func $gate (param $x v128) (param $c1 v128) (param $c3 v128) (result v128)
    (local $u v128)
    ;; x^2 is bounded so that 0 * x^2 stays 0.
    (local.set $u (f32x4.pmin (f32x4.mul (local.get $x) (local.get $x)) (v128.const f32x4 1e30 1e30 1e30 1e30)))
    local.get $u local.get $c3 local.get $c1 f32x4.relaxed_madd local.set $u
    (f32x4.div (local.get $x)
      (f32x4.add (v128.const f32x4 1 1 1 1) (call $exp (f32x4.neg (f32x4.mul (local.get $u) (local.get $x)))))))

  ;; Elements $job * $perJob ... of $count; $size is 4 (f32) or 2 (bf16), of input and output.
  (func (export "activate") (param $job i32) (param $from i32) (param $to i32) (param $count i32) (param $perJob i32)
    (param $size i32) (param $c1 f32) (param $c3 f32)
    (local $k1 v128) (local $k3 v128) (local $step i32)
    (local.set $k1 (f32x4.splat (local.get $c1)))
    (local.set $k3 (f32x4.splat (local.get $c3)))
    (local.set $job (i32.mul (local.get $job) (local.get $perJob)))
    (local.set $count (i32.sub (local.get $count) (local.get $job)))
    (if (i32.gt_s (local.get $count) (local.get $perJob)) (then (local.set $count (local.get $perJob))))
    (local.set $from (i32.add (local.get $from) (i32.mul (local.get $job) (local.get $size))))
    (local.set $to (i32.add (local.get $to) (i32.mul (local.get $job) (local.get $size))))
    (local.set $step (i32.shl (local.get $size) (i32.const 2)))
    (block $done
      (loop $fours
        (br_if $done (i32.lt_s (local.get $count) (i32.const 4)))
        (call $store4 (local.get $to) (local.get $size)
          (call $gate (call $load4 (local.get $from) (local.get $size)) (local.get $k1) (local.get $k3)))
        (local.set $from (i32.add (local.get $from) (local.get $step)))
        (local.set $to (i32.add (local.get $to) (local.get $step)))
        (local.set $count (i32.sub (local.get $count) (i32.const 4)))
        (br $fours)))
    (block $done
      (loop $ones
        (br_if $done (i32.eqz (local.get $count)))
        (call $store1 (local.get $to) (local.get $size)
          (call $gate (call $load1 (local.get $from) (local.get $size)) (local.get $k1) (local.get $k3)))
        (local.set $from (i32.add (local.get $from) (local.get $size)))
        (local.set $to (i32.add (local.get $to) (local.get $size)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $ones))))
)
